# SPDX-License-Identifier: Apache-2.0
"""The engine for any machine: transformers' own models on torch. Runs in processes of its own, never in the daemon."""
