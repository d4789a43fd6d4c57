# SPDX-License-Identifier: Apache-2.0
"""Engines: the daemon's side of inference processes, which it starts, parks, wakes and rebinds."""
