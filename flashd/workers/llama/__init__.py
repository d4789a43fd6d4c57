# SPDX-License-Identifier: Apache-2.0
"""Engine processes that answer with llama.cpp: each runs llama-server as its child, behind our gate."""
