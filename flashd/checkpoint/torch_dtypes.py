# SPDX-License-Identifier: Apache-2.0
"""The dtypes of torch by their names in safetensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flashd.checkpoint.dtypes import DTYPES

# The youngest of them are not in every torch that will do.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if hasattr(torch, dtype.torch_name)
}
