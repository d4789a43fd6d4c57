# SPDX-License-Identifier: Apache-2.0
"""Access: authorisation, ownership, limits for each user, and disclosure."""
