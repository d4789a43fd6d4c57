# SPDX-License-Identifier: Apache-2.0
"""A user's own daemon under the user's systemd: loaded models outlive it, as those of the machine's daemon do."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import Machine, Result

Run = Callable[..., Result]
UNIT = "flashd.service"
LIST = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8434/v1/models').read().decode())"


@pytest.fixture(scope="module")
def erin(machine: Machine) -> Run:
    """Runs commands as a user who knows of no machine's daemon."""
    machine.run("useradd", "-m", "erin")
    machine.run("loginctl", "enable-linger", "erin")
    machine.until(lambda: machine.run_as("erin", "systemctl", "--user", "is-system-running", check=False).status == 0)

    def run(*command: str, check: bool = True) -> Result:
        alone = "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nowhere"
        return machine.run_as("erin", "env", "HOME=/home/erin", alone, *command, check=check)

    return run


def residency(erin: Run) -> dict[str, str]:
    return {model["name"]: model["residency"] for model in json.loads(erin("flash", "list", "--json").out)}


def listed_by_gateway(erin: Run) -> list[str]:
    """The models at the address that `flash start` opens, none if nobody answers there."""
    asked = erin("python3", "-c", LIST, check=False)
    return [model["id"] for model in json.loads(asked.out)["data"]] if asked.status == 0 else []


def main_pid(erin: Run) -> str:
    return erin("systemctl", "--user", "show", "--value", "-p", "MainPID", UNIT).out.strip()


def test_it_is_a_unit_whose_models_stay_warm_whatever_ends_it(machine: Machine, erin: Run) -> None:
    machine.make_source("/home/erin/warm", owner="erin")
    erin("flash", "start")
    erin("flash", "import", "/home/erin/warm")
    erin("flash", "load", "warm")
    assert residency(erin) == {"warm": "host"}
    assert listed_by_gateway(erin) == ["warm"]
    erin("flash", "config", "engines.max_parked", "3")
    for end in (
        ("systemctl", "--user", "kill", "--kill-who=main", "--signal=KILL", UNIT),
        ("flash", "restart"),
        ("systemctl", "--user", "restart", UNIT),
    ):
        before = main_pid(erin)
        erin(*end)
        machine.until(lambda before=before: main_pid(erin) not in {"0", before})
        machine.until(lambda: erin("flash", "status", check=False).status == 0)
        assert residency(erin) == {"warm": "host"}
        machine.until(lambda: listed_by_gateway(erin) == ["warm"])
    assert erin("flash", "config", "engines.max_parked").out == "3\n"
    erin("systemctl", "--user", "kill", "--kill-who=main", "--signal=KILL", "flashd-gateway.service")
    machine.until(lambda: listed_by_gateway(erin) == ["warm"])


@pytest.mark.parametrize("end", [("flash", "stop"), ("systemctl", "--user", "stop", UNIT)])
def test_nothing_is_left_of_one_that_was_stopped(machine: Machine, erin: Run, end: tuple[str, ...]) -> None:
    erin("flash", "start", check=False)
    erin(*end)
    uid = erin("id", "-u").out.strip()
    machine.until(lambda: machine.run("test", "-e", f"/run/user/{uid}/flashd", check=False).status != 0)
    for program in ("flashd.daemon", "flashd.gateway"):
        machine.until(lambda program=program: program not in machine.run("ps", "-u", "erin", "-o", "args").out)
    assert "dbus-daemon" not in machine.run("ps", "-u", "erin", "-o", "args").out
    erin("flash", "start")
    assert residency(erin) == {"warm": "stored"}


def test_engines_are_in_units_of_their_own(machine: Machine, erin: Run) -> None:
    """A zygote that imports for ever will do: there is no torch here."""
    stub = machine.root / "home/erin/python"
    stub.write_text("#!/bin/sh\nexec sleep 1000\n")
    stub.chmod(0o755)
    erin("flash", "start", check=False)
    erin("flash", "config", "engines.torch.python", "/home/erin/python")
    erin("flash", "restart")
    units = ("systemctl", "--user", "list-units", "--no-legend", "--plain", "--type=scope", "flashd-torch-*")
    machine.until(lambda: "flashd-torch-" in erin(*units).out)
    erin("flash", "stop")
    machine.until(lambda: erin(*units).out == "")


def test_the_machines_daemon_restarts_itself_with_what_is_warm(machine: Machine) -> None:
    machine.make_source("/root/shared")
    machine.run("flash", "import", "/root/shared")
    machine.run("flash", "load", "shared")
    before = machine.show("flashd", "MainPID")
    machine.run("flash", "restart")
    assert machine.show("flashd", "MainPID") != before
    assert machine.models()["shared"] == "host"
