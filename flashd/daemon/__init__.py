# SPDX-License-Identifier: Apache-2.0
"""How is everything put together into one process on the bus?"""
