# SPDX-License-Identifier: Apache-2.0
"""The daemon's objects on D-Bus, and the announcement of their changes."""
