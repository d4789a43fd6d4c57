# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker on a GPU, with weights in ordinary memory, where its sleep mode does not release them."""

from __future__ import annotations

import contextlib

from vllm.v1.worker.gpu_worker import Worker

if not hasattr(Worker, "_maybe_get_memory_pool_context"):
    raise ImportError("this version of vLLM has no _maybe_get_memory_pool_context, on which parked engines depend")


class GpuWorker(Worker):  # type: ignore[misc]
    """The process of a rank (`--worker-cls`)."""

    def _maybe_get_memory_pool_context(self, tag: str) -> contextlib.AbstractContextManager[None]:
        """Has sleep mode release only the KV cache.

        Called by vLLM (0.22 to 0.33) around what it allocates for each tag. Weights become an image, which is unmapped
        while the engine is parked; what else is allocated with them, such as adapters and what kernels keep, must stay.
        """
        if tag == "weights":
            return contextlib.nullcontext()
        pool: contextlib.AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return pool
