# SPDX-License-Identifier: Apache-2.0
"""Who answers? Inference processes, and how they are started, parked, woken and rebound."""
