# SPDX-License-Identifier: Apache-2.0
"""Merges LoRA adapters into their bases: reads an adapter, plans the merge, and computes it in a separate process."""
