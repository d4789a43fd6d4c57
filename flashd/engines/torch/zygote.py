# SPDX-License-Identifier: Apache-2.0
"""What is imported once, so that every engine process starts in milliseconds?

python -m flashd.engines.torch.zygote CONTROL_FD FOLDER
"""

from __future__ import annotations

import sys

import torch
import transformers
from transformers import (  # noqa: F401 -- imported so that forks have them
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    TextStreamer,
)

from flashd.engines import forking
from flashd.engines.torch import worker


def main() -> None:
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    forking.serve(sys.argv, worker.main, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
