# SPDX-License-Identifier: Apache-2.0
"""The client library, which runs in the user's program and talks D-Bus to the daemon and HTTP to the engine."""
