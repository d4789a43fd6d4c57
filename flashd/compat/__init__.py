# SPDX-License-Identifier: Apache-2.0
"""How does a program that was written for another loader run on flashd? As a client of the daemon."""
