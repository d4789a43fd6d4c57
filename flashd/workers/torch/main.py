# SPDX-License-Identifier: Apache-2.0
"""The torch zygote: imports everything once, so that every engine process starts in milliseconds.

python -m flashd.workers.torch.main CONTROL_FD FOLDER
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping

from flashd.workers import zygote


def prepare() -> tuple[zygote.Work, Mapping[str, str]]:
    """Imports what engines need. Returns their work, and the framework with its version."""
    gc.disable()  # until the forks: imports free nothing, and collections would take a fifth of their time
    import torch
    import transformers
    from transformers import (  # noqa: F401 -- imported for the forks
        AutoConfig,
        AutoModel,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
        PreTrainedModel,
        Qwen3ForCausalLM,
        TextStreamer,
    )

    from flashd.workers.torch import worker

    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    return worker.main, {"torch": torch.__version__}


def main() -> None:
    zygote.serve(sys.argv, *prepare())


if __name__ == "__main__":
    main()
