# SPDX-License-Identifier: Apache-2.0
"""The engine for throughput: vLLM. Its loader runs in any vLLM; its engines run in processes of their own."""
