# SPDX-License-Identifier: Apache-2.0
"""The tray: which model answers, and another one at a click. A client of the daemon like any other, over D-Bus."""
