# SPDX-License-Identifier: Apache-2.0
"""Memory: arenas, pools, residency over the tiers, transfers and leases."""
