# SPDX-License-Identifier: Apache-2.0
"""D-Bus addresses: several servers, escapes, guids, abstract sockets, and invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashd.dbus import address as bus_address
from flashd.dbus.address import Server
from flashd.errors import InvalidArgument

GUID = "5aa8983fe5dd3c6e98eebaff6b0ba05d"


@pytest.mark.parametrize(
    ("entry", "server"),
    [
        ("unix:path=/run/bus", Server(b"/run/bus")),
        ("unix:path=/a%20b%2cc/%c3%a9/bus", Server(b"/a b,c/\xc3\xa9/bus")),
        ("unix:path=/with blanks/bus", Server(b"/with blanks/bus")),
        ("unix:abstract=/tmp/dbus-%2a", Server(b"\0/tmp/dbus-*")),
        (f"unix:guid={GUID.upper()},path=/run/bus", Server(b"/run/bus", GUID)),
        (f"unix:path=/run/bus,guid={'0' * 32}", Server(b"/run/bus")),
        ("unix:path=/run/bus,new=thing", Server(b"/run/bus")),
        ("unix:runtime=yes", Server(b"/run/mine/bus")),
    ],
)
def test_where_it_listens(entry: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/mine")
    assert bus_address.server(entry) == server


@pytest.mark.parametrize(
    "entry",
    [
        *("nonsense", "unix:", "unix:path", "unix:path=", "unix:path=/a%2", "unix:path=/a%zz", "unix:path=/a%00b"),
        *("unix:path=/a,abstract=b", "unix:path=/a,path=/b", "unix:tmpdir=/tmp", "tcp:host=localhost,port=1"),
        *("unixexec:path=/bin/sh,argv1=-c", "autolaunch:", "launchd:env=X", "nonce-tcp:host=a,port=1,noncefile=/x"),
    ],
)
def test_what_is_none_is_refused(entry: str) -> None:
    with pytest.raises(InvalidArgument):
        bus_address.server(entry)


def test_several_are_in_order_and_names_stand_for_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bus_address.entries("unix:path=/a;;unix:path=/b;") == ["unix:path=/a", "unix:path=/b"]
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/s;unix:path=/t")
    assert bus_address.entries("session") == ["unix:path=/s", "unix:path=/t"]
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS", raising=False)
    assert bus_address.entries("system") == ["unix:path=/run/dbus/system_bus_socket"]


@pytest.mark.parametrize("path", ["/run/user/1000/bus", "/tmp/a b,c;d=e%f/bus", "/tmp/é/bus"])
def test_a_path_survives(path: str) -> None:
    address = bus_address.of_socket(Path(path))
    assert bus_address.entries(address) == [address]
    assert bus_address.server(address).socket == path.encode()
