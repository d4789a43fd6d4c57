# SPDX-License-Identifier: Apache-2.0
"""The engine for any machine: transformers' models on torch, in separate processes, never in the daemon."""
