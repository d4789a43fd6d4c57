# SPDX-License-Identifier: Apache-2.0
"""~/models of every user, although the daemon cannot read homes."""

from __future__ import annotations

import pytest
from conftest import Machine


@pytest.fixture(scope="module")
def homes(machine: Machine) -> Machine:
    """dave may not add models, erin and fred may; all are logged in, as far as systemd is concerned."""
    machine.run("useradd", "-m", "dave")
    for member in ("erin", "fred"):
        machine.run("useradd", "-m", "-G", "flashd", member)
    for user in ("dave", "erin", "fred"):
        machine.run("chmod", "0700", f"/home/{user}")
        machine.run("loginctl", "enable-linger", user)
        machine.until(lambda user=user: state(machine, user) == "active")
    return machine


def state(machine: Machine, user: str) -> str:
    return machine.run_as(user, "systemctl", "--user", "is-active", "flashd-inbox", check=False).out.strip()


def said(machine: Machine) -> str:
    return machine.run("journalctl", "--no-pager", "-t", "flashd-inbox").out


def test_what_settles_in_a_home_becomes_a_model(homes: Machine) -> None:
    homes.make_source("/home/erin/models/team/one", seed=1, owner="erin")
    homes.until(lambda: "team/one" in homes.models())
    uid = homes.run("id", "-u", "erin").out.strip()
    assert f"imported by user {uid}" in homes.run("flash", "show", "team/one").out


def test_a_changed_source_becomes_a_new_version(homes: Machine) -> None:
    before = homes.run("flash", "show", "team/one", "--json").out
    homes.run("rm", "-r", "/home/erin/models/team/one")
    homes.make_source("/home/erin/models/team/one", seed=2, owner="erin")
    homes.until(lambda: homes.run("flash", "show", "team/one", "--json").out != before)


def test_nobodys_inbox_replaces_what_somebody_else_made(homes: Machine) -> None:
    checkpoint = homes.run("flash", "show", "team/one", "--json").out
    homes.make_source("/home/fred/models/team/one", seed=3, owner="fred")
    homes.until(lambda: "team/one does not become a model" in said(homes))
    assert homes.run("flash", "show", "team/one", "--json").out == checkpoint


def test_a_login_converts_nothing_anew(homes: Machine) -> None:
    before = said(homes).count("is a model")
    homes.run_as("erin", "systemctl", "--user", "restart", "flashd-inbox")
    homes.make_source("/home/erin/models/two", seed=4, owner="erin")
    homes.until(lambda: "two" in homes.models())
    homes.until(lambda: said(homes).count("is a model") == before + 1)


def test_it_starts_the_daemon_that_is_not_running(homes: Machine) -> None:
    homes.run("systemctl", "stop", "flashd")
    homes.make_source("/home/erin/models/three", seed=5, owner="erin")
    homes.until(lambda: homes.show("flashd", "ActiveState") == "active")
    homes.until(lambda: "three" in homes.models())


def test_who_may_not_add_models_waits_until_they_may(homes: Machine) -> None:
    homes.make_source("/home/dave/models/daves", seed=6, owner="dave")
    homes.until(lambda: "daves has to wait: you may not" in said(homes))
    assert "daves" not in homes.models()
    homes.run("usermod", "-aG", "flashd", "dave")
    homes.run_as("dave", "systemctl", "--user", "restart", "flashd-inbox")
    homes.until(lambda: "daves" in homes.models())


def test_what_is_no_model_is_said_once_and_keeps_nobody_out(homes: Machine) -> None:
    homes.make_source("/home/erin/models/broken", seed=7, owner="erin")
    homes.run("truncate", "-s", "100", "/home/erin/models/broken/model.safetensors")
    homes.make_source("/home/erin/models/good", seed=8, owner="erin")
    homes.until(lambda: "good" in homes.models())
    homes.until(lambda: "broken does not become a model" in said(homes))
    assert "broken" not in homes.models()
    assert state(homes, "erin") == "active"
