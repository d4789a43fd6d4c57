# SPDX-License-Identifier: Apache-2.0
"""The configuration, the locations of files, and the environment.

settings.py      all settings, with defaults and documentation
loading.py       reads settings from files, drop-ins and the command line, and writes them
paths.py         locations of files
environment.py   the only reader of the environment
"""
