# SPDX-License-Identifier: Apache-2.0
"""Where are the bytes now, and who keeps them there?"""
