# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of flashd on this machine, compared with the limits of its hardware."""
