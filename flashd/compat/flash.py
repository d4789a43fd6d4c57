# SPDX-License-Identifier: Apache-2.0
"""`from flashtensors import flash`: tensors to a folder and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashd import state_dicts
from flashd.state_dicts import save_dict

if TYPE_CHECKING:
    import torch

    from flashd.state_dicts import DeviceMap, Loading

__all__ = ["load_dict", "load_dict_non_blocking", "save_dict"]


def load_dict(
    model_path: str | os.PathLike[str],
    device_map: DeviceMap = None,
    storage_path: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """See `flashd.load_dict`. A relative `model_path` counts from `storage_path`, if that is given."""
    return state_dicts.load_dict(Path(storage_path or "", model_path), device_map)


def load_dict_non_blocking(
    model_path: str | os.PathLike[str],
    device_map: DeviceMap = None,
    storage_path: str | os.PathLike[str] | None = None,
) -> tuple[Loading, dict[str, torch.Tensor]]:
    """See `flashd.load_dict_non_blocking`: the first is what flashtensors calls the replica; `wait()` confirms it."""
    return state_dicts.load_dict_non_blocking(Path(storage_path or "", model_path), device_map)
