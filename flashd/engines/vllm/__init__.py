# SPDX-License-Identifier: Apache-2.0
"""The engine for throughput: vLLM. Its loader runs in any vLLM; its engines run in processes of their own."""

IMAGE_FORMAT = "2"  # of what images.py makes; a part of every image's key, the daemon's and a user's
