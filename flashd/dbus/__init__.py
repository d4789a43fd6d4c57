# SPDX-License-Identifier: Apache-2.0
"""D-Bus: the connection, limits of messages, the object tree, and the documented interfaces."""
