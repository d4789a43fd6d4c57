# SPDX-License-Identifier: Apache-2.0
"""Swaps between models: the state machine with its rollback, and the weights given to engines."""
