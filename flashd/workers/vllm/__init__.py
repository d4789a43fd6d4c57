# SPDX-License-Identifier: Apache-2.0
"""The engine for throughput: vLLM, in separate processes. Its loader also works in other vLLM servers."""
