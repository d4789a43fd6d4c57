# SPDX-License-Identifier: Apache-2.0
"""The daemon: one process on the bus, built from all other parts."""
