#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Swaps to a model and asks it, by D-Bus and HTTP alone. Needs python3-gi.

swap_and_ask.py MODEL QUESTION      FLASHD_BUS_ADDRESS names another bus than the system's
"""

import http.client
import json
import os
import socket
import sys

from gi.repository import Gio, GLib

NAME, ROOT = "org.flashd1", "/org/flashd1"


def connect():
    address = os.environ.get("FLASHD_BUS_ADDRESS")
    if not address:
        return Gio.bus_get_sync(Gio.BusType.SYSTEM)
    flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
    return Gio.DBusConnection.new_for_address_sync(address, flags)


def call(bus, path, interface, method, arguments=None):
    flags = Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION
    return bus.call_sync(NAME, path, interface, method, arguments, None, flags, GLib.MAXINT32).unpack()


def get(bus, path, interface, name):
    arguments = GLib.Variant("(ss)", (interface, name))
    return call(bus, path, "org.freedesktop.DBus.Properties", "Get", arguments)[0]


def swap(bus, model):
    """Returns where the model answers."""
    loop = GLib.MainLoop()
    # Before the call, so that a job that is quick cannot finish unseen; then the job's own state is what counts.
    bus.signal_subscribe(NAME, "org.flashd1.Job", "Finished", None, None, 0, lambda *_: loop.quit())
    (job,) = call(bus, ROOT, "org.flashd1.Manager", "Swap", GLib.Variant("(sa{sv})", (model, {})))
    while get(bus, job, "org.flashd1.Job", "State") not in {"done", "failed", "cancelled"}:
        loop.run()
    name, message, _ = get(bus, job, "org.flashd1.Job", "Error")
    if name:
        sys.exit(f"{name}: {message}")
    return get(bus, job, "org.flashd1.Job", "Result")["endpoint"]


class UnixConnection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


def ask(endpoint, question):
    connection = UnixConnection(endpoint)
    body = json.dumps({"messages": [{"role": "user", "content": question}]})
    headers = {"Content-Type": "application/json", "Host": "localhost"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return json.load(connection.getresponse())["choices"][0]["message"]["content"]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(ask(swap(connect(), sys.argv[1]), sys.argv[2]))
    except GLib.Error as error:
        sys.exit(f"{sys.argv[1]}: {Gio.DBusError.get_remote_error(error) or error.message}")
