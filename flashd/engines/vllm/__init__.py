# SPDX-License-Identifier: Apache-2.0
"""The engine for throughput: vLLM. Its loader runs in any vLLM; its engines run in processes of their own."""

# Of images: how we have vLLM build a model, and how images.py moves it into one. A part of each key.
IMAGE_FORMAT = "2"
