# SPDX-License-Identifier: Apache-2.0
"""`import flashtensors.flash`: tensors to a folder and back."""

from __future__ import annotations

from flashd.compat.flash import load_dict, load_dict_non_blocking, save_dict

__all__ = ["load_dict", "load_dict_non_blocking", "save_dict"]
