# SPDX-License-Identifier: Apache-2.0
"""Serving: swaps, loads, leases, the endpoint, idle engines, memory pressure and shared images."""
