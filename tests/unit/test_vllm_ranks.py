# SPDX-License-Identifier: Apache-2.0
"""The number of GPUs follows from vLLM's arguments, and an image's key has everything that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.manifest import Manifest
from flashd.engines.engine import GpuPlan
from flashd.engines.process import Settings
from flashd.engines.vllm_factory import Ranks, VllmFactory
from flashd.errors import Unsupported
from flashd.io.cuda import Gpu
from flashd.units import GiB, MiB

H100 = Gpu(0, "H100", "a", 80 * GiB, False, False, True, True, True)
BUILD = {"vllm": "0.23.0", "torch": "2.11.0", "platform": "cuda"}
MANIFEST = Manifest(
    id="checkpoint", weights="", header_digest="", digests_digest="", digest_block_bytes=4096, data_offset=4096,
    data_bytes=16 * GiB, tensor_count=1, dtype="BF16", architecture="A", architecture_key="a", layout="",
    quantization="", side_files={}, created_at=0, source="",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "tensor", "count"),
    [
        ([], 1, 1),
        (["--seed", "0"], 1, 1),
        (["--tensor-parallel-size", "2"], 2, 2),
        (["--tensor-parallel-size=4", "--seed", "0"], 4, 4),
        (["--tensor_parallel_size", "2"], 2, 2),
        (["-tp", "2"], 2, 2),
        (["-tp=2", "-pp=3"], 2, 6),
        (["-dp", "2"], 1, 2),
        (["-tp", "2", "-tp", "4"], 4, 4),  # the last one counts
        (["-tp", "several"], 1, 1),  # vLLM refuses it, with words of its own
    ],
)
def test_ranks(arguments: list[str], tensor: int, count: int) -> None:
    assert Ranks.parse(arguments) == Ranks(tensor, count)


class Zygote:
    """What has imported a vLLM, or would have."""

    def __init__(self, build: dict[str, str]) -> None:
        self._build = build

    async def build(self) -> dict[str, str]:
        return self._build


async def plan(
    arguments: Sequence[str] = (), *, gpus: int = 2, gpu: str = "H100", vllm: str = "0.23.0", **manifest: Any
) -> GpuPlan:
    options = {"arguments": list(arguments), "adapters": [], "kv_cache_bytes": 2 * GiB}
    settings = Settings("python", Path("/run"), Path("/logs"), 1, 64, 60.0, options=options)
    factory = VllmFactory(settings, [replace(H100, ordinal=ordinal, model=gpu) for ordinal in range(gpus)])
    factory._zygote = cast(Any, Zygote({**BUILD, "vllm": vllm}))
    found = await factory.gpu_plan(Checkpoint(Path("/nowhere"), replace(MANIFEST, **manifest)))
    assert found is not None
    return found


async def test_each_rank_has_a_device_and_a_part_of_its_own() -> None:
    (one,) = (await plan()).ranks
    first, second = (await plan(["-tp", "2"])).ranks
    assert [one.device, first.device, second.device] == ["cuda:0", "cuda:0", "cuda:1"]
    assert len({one.key, first.key, second.key, ""}) == 4
    assert 8 * GiB < first.weights_bytes < 10 * GiB < 16 * GiB < one.weights_bytes < 17 * GiB
    assert first.working_bytes > one.working_bytes >= 2 * GiB + 512 * MiB
    assert one.starting_bytes == one.weights_bytes - 2 * GiB, "vLLM's own weights, while there is no KV cache"
    with pytest.raises(Unsupported, match=r"4 GPUs.*there are 2"):
        await plan(["-tp", "4"])


async def test_pipelines_and_copies_make_no_image() -> None:
    for arguments in (["-pp", "2"], ["-dp", "2"]):
        found = await plan(arguments)
        assert len(found.ranks) == 2 and not found.makes_image and found.ranks[0].starting_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        {"vllm": "0.24.0"},
        {"gpu": "H200"},
        {"arguments": ["--quantization", "fp8"]},
        {"id": "another checkpoint"},
        {"architecture_key": "b"},
        {"quantization": "fp8"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_an_image_of_another_build_or_model_is_another(change: dict[str, Any]) -> None:
    if change == {"quantization": "fp8"}:
        change = {**change, "architecture_key": "of eight bits"}  # whose layout and configuration it has
    key = (await plan()).ranks[0].key
    assert key and (await plan(**change)).ranks[0].key not in {key, ""}


@pytest.mark.parametrize(
    ("method", "images", "shares"), [("fp8", True, True), ("mxfp4", True, False), ("awq", True, True)]
)
async def test_quantised(method: str, images: bool, shares: bool) -> None:
    found = await plan(quantization=method)
    assert found.makes_image is images
    options = {"arguments": [], "adapters": [], "kv_cache_bytes": 0}
    settings = Settings("python", Path("/run"), Path("/logs"), 1, 64, 60.0, options=options)
    factory = VllmFactory(settings, [H100])
    tunes = [Checkpoint(Path("/nowhere"), replace(MANIFEST, id=name, quantization=method)) for name in ("a", "b")]
    first, second = map(factory.rebind_key, tunes)
    assert (first != "") is images and (first == second != "") is shares
