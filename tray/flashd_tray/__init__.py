# SPDX-License-Identifier: Apache-2.0
"""The tray: shows the active model and switches to another one at a click.

An ordinary client of the daemon, over D-Bus.
"""
