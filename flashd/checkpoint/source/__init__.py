# SPDX-License-Identifier: Apache-2.0
"""Reads sources: safetensors, pickles, trainers' folders, shards, unfinished downloads."""
