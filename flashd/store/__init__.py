# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints do we have, under which names, and how do new ones arrive?"""
