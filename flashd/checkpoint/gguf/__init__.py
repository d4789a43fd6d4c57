# SPDX-License-Identifier: Apache-2.0
"""GGUF files, the form of models that llama.cpp reads. A checkpoint of one holds the file as it is."""
