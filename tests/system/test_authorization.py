# SPDX-License-Identifier: Apache-2.0
"""Authorisations by the real polkit, requested by users' programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Machine, Result

OBJECT = ("org.flashd1", "/org/flashd1")
READS = ("busctl", "call", *OBJECT, "org.flashd1.Manager", "ListModels")
USES = ("busctl", "call", *OBJECT, "org.flashd1.Manager", "Load", "ssa{sv}", "one", "host", "0")
MANAGES = ("busctl", "call", *OBJECT, "org.flashd1.Manager", "Collect")
ADMINISTERS = ("busctl", "call", *OBJECT, "org.flashd1.Manager", "SetConfig", "ss", "memory.host_budget", "3GB")
INSTALLS = ("busctl", "call", *OBJECT, "org.flashd1.Manager", "UseEnvironment", "su", "torch", "0")
GDBUS = ("gdbus", "call", "--system", "-d", OBJECT[0], "-o", OBJECT[1], "-m")
BY_GDBUS = {
    (*GDBUS, "org.flashd1.Manager.ListModels"): READS,
    (*GDBUS, "org.flashd1.Manager.Load", "one", "host", "{}"): USES,
    (*GDBUS, "org.flashd1.Manager.Collect"): MANAGES,
    (*GDBUS, "org.flashd1.Manager.SetConfig", "memory.host_budget", "3GB"): ADMINISTERS,
    (*GDBUS, "org.flashd1.Manager.UseEnvironment", "torch", "0"): INSTALLS,
}
BY_FLASH = {
    ("flash", "list"): READS,
    ("flash", "load", "one"): USES,
    ("flash", "scrub"): MANAGES,
    ("flash", "config", "memory.host_budget", "3GB"): ADMINISTERS,
    ("flash", "engine", "use", "torch", "0"): INSTALLS,
}
CALLS = {
    READS: READS,
    USES: USES,
    MANAGES: MANAGES,
    ADMINISTERS: ADMINISTERS,
    INSTALLS: INSTALLS,
    **BY_GDBUS,
    **BY_FLASH,
}

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def people(machine: Machine) -> Machine:
    machine.run("useradd", "-m", "dave")
    machine.run("useradd", "-m", "-G", "flashd", "erin")
    machine.make_source("/root/one")
    machine.run("flash", "import", "/root/one", "one")
    return machine


def outsider(machine: Machine, *command: str) -> Result:
    return machine.run_as("dave", *command, check=False)


def member(machine: Machine, *command: str) -> Result:
    return machine.run_as("erin", *command, check=False)


def seated(machine: Machine, *command: str) -> Result:
    # systemd's programs speak to the journal if systemd itself is their parent.
    return machine.run_at_seat("dave", "env", "SYSTEMD_LOG_TARGET=console", *command, check=False)


def root(machine: Machine, *command: str) -> Result:
    return machine.run(*command, check=False)


@pytest.mark.parametrize(
    ("who", "may"),
    [(outsider, {READS}), (member, {READS, USES, MANAGES}), (seated, {READS, USES, MANAGES}), (root, None)],
    ids=["outsider", "member", "seated", "root"],
)
@pytest.mark.parametrize("what", CALLS, ids=lambda what: " ".join(what).replace("/", ".")[-60:])
def test_who_may_do_what(people: Machine, who: Run, may: set[tuple[str, ...]] | None, what: tuple[str, ...]) -> None:
    asked = CALLS[what]
    result = who(people, *what)
    if may is None or asked in may:
        assert result.status == 0, result
    else:
        assert result.status != 0
        assert "may not" in result.err or "NotAuthorized" in result.err, result


def test_flash_says_what_to_do_about_it(people: Machine) -> None:
    refused = outsider(people, "flash", "import", "/etc/hostname", "it")
    assert refused.status != 0
    changed = outsider(people, "flash", "config", "memory.host_budget", "3GB")
    assert changed.status == 5
    assert "administrator" in changed.err


def test_polkit_does_not_know_of_actions_that_are_ours_and_missing(people: Machine) -> None:
    listed = people.run("pkaction").out.split()
    assert {"org.flashd1.use", "org.flashd1.manage", "org.flashd1.administer"} <= set(listed)


def test_an_administrators_rule_comes_first(people: Machine) -> None:
    rule = people.root / "etc/polkit-1/rules.d/10-local.rules"
    rule.write_text(
        'polkit.addRule(function (action, subject) { if (action.id == "org.flashd1.manage" && '
        'subject.user == "dave") { return polkit.Result.YES; } });\n'
    )
    people.until(lambda: outsider(people, *MANAGES).status == 0)
    rule.unlink()
    people.until(lambda: outsider(people, *MANAGES).status != 0)


def test_without_polkit_only_root_may_change_anything(people: Machine) -> None:
    people.run("systemctl", "mask", "--now", "polkit")
    try:
        assert member(people, *READS).status == 0
        refused = member(people, *MANAGES)
        assert "could not be asked" in refused.err
        assert root(people, *ADMINISTERS).status == 0
    finally:
        people.run("systemctl", "unmask", "polkit")


def test_nobody_else_may_be_flashd(people: Machine) -> None:
    people.run("systemctl", "stop", "flashd")
    taken = member(people, "busctl", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus",
                   "RequestName", "su", "org.flashd1", "0")  # fmt: skip
    assert taken.status != 0
    assert "Access denied" in taken.err
