# SPDX-License-Identifier: Apache-2.0
"""`from flashtensors import flash`: tensors to a folder and back."""

from __future__ import annotations

from flashd.client.state_dicts import load_dict, load_dict_non_blocking, save_dict

__all__ = ["load_dict", "load_dict_non_blocking", "save_dict"]
