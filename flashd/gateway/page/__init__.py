# SPDX-License-Identifier: Apache-2.0
"""The gateway's page at `/`, and the state of the machine for it and for other programs, under `/flashd/v1`.

schema.py     the state, as JSON
jobs.py       jobs of the daemon, from its signals
requests.py   requests of clients, from when they come to when their answers end
feed.py       the state for each client, and its changes
rights.py     which changes a client may make
actions.py    changes that the page asks for
settings.py   the settings as the page shows them
endpoints.py  the paths under /flashd/v1
files.py      the files of the page, in static/
"""
