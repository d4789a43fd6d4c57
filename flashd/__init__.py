# SPDX-License-Identifier: Apache-2.0
"""Holds a hundred models on one machine and switches between them while you watch."""

__version__ = "0.1.0"
