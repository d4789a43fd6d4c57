# SPDX-License-Identifier: Apache-2.0
"""Several users on one machine: the journal, the watchdog, `flash doctor` and `flash report`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Machine

HANGS = Path(__file__).parents[1] / "bus" / "hangs.c"
GDBUS = ("gdbus", "call", "--system", "-d", "org.flashd1", "-o", "/org/flashd1", "-m")


HOLDS = """
import time, flashd
with flashd.connect() as client, client.lease("open"):
    while True:
        time.sleep(1)
"""


@pytest.fixture(scope="module")
def people(machine: Machine) -> Machine:
    """dave is nobody, erin and fred are members; erin has a private model."""
    machine.run("useradd", "-m", "dave")
    for member in ("erin", "fred"):
        machine.run("useradd", "-m", "-G", "flashd", member)
    machine.make_source("/home/erin/open", owner="erin")
    machine.make_source("/home/erin/codename", seed=2, owner="erin")
    machine.run_as("erin", "flash", "import", "/home/erin/open", "open")
    machine.run_as("erin", "flash", "import", "--private", "/home/erin/codename", "codename")
    return machine


def names(machine: Machine, user: str) -> set[str]:
    return {model["name"] for model in json.loads(machine.run_as(user, "flash", "list", "--json").out)}


def test_a_private_model_is_its_owners_and_roots(people: Machine) -> None:
    assert names(people, "erin") == {"open", "codename"}
    assert names(people, "fred") == names(people, "dave") == {"open"}
    assert set(people.models()) == {"open", "codename"}
    assert people.run_as("fred", "flash", "load", "codename", check=False).status == 3
    tree = people.run_as("fred", "busctl", "tree", "org.flashd1").out
    assert "open" in tree and "codename" not in tree
    listed = people.run_as("fred", *GDBUS, "org.freedesktop.DBus.ObjectManager.GetManagedObjects").out
    assert "open" in listed and "codename" not in listed
    for folder in ("models", "checkpoints"):
        refused = people.run_as("fred", "ls", f"/var/lib/flashd/store/{folder}", check=False)
        assert "Permission denied" in refused.err


def test_nobody_takes_anothers_name(people: Machine) -> None:
    people.make_source("/home/fred/open", seed=3, owner="fred")
    refused = people.run_as("fred", "flash", "import", "/home/fred/open", "open", check=False)
    assert refused.status == 5 and "belongs to user" in refused.err
    assert people.run_as("fred", "flash", "import", "/home/fred/open", "codename", check=False).status == 4
    assert people.run_as("fred", "flash", "rm", "--yes", "open", check=False).status == 5
    # Nor by way of the machine's folder, where every member may write.
    people.make_source("/var/lib/flashd/models/open", seed=4, owner="fred")
    people.until(lambda: "another user has a model" in people.run_as("fred", "flash", "list").err)
    people.run("rm", "-r", "/var/lib/flashd/models/open")


def test_a_lease_of_somebody_elses_is_an_administrators_to_end(people: Machine) -> None:
    options = ("--unit=holder", "-p", "User=erin", "-p", "Type=exec")
    people.run("systemd-run", "-q", *options, "/usr/lib/flashd/bin/python3", "-c", HOLDS)
    leases: list[str] = []

    def found() -> bool:
        leases[:] = re.findall(r"/org/flashd1/lease/\w+", people.run("busctl", "tree", "--list", "org.flashd1").out)
        return bool(leases)

    people.until(found)
    release = ("busctl", "call", "org.flashd1", leases[0], "org.flashd1.Lease", "Release")
    refused = people.run_as("fred", *release, check=False)
    assert refused.status == 1 and "belongs to user" in refused.err
    assert found(), "it is still held"
    people.run(*release)
    people.until(lambda: not found())
    people.run("systemctl", "stop", "holder")


def test_who_is_refused_reads_why_and_what_to_do_in_gdbus_too(people: Machine) -> None:
    refused = people.run_as("dave", *GDBUS, "org.flashd1.Manager.Collect", check=False)
    assert refused.status == 1
    assert "you may not add, change or remove models" in refused.err
    assert "ask an administrator" in refused.err


@pytest.mark.parametrize("interactive", ["yes", "no"])
def test_where_nobody_can_be_asked_the_answer_is_no_and_comes_at_once(people: Machine, interactive: str) -> None:
    call = ("busctl", f"--allow-interactive-authorization={interactive}", "call", "org.flashd1", "/org/flashd1")
    refused = people.run_as("dave", "timeout", "20", *call, "org.flashd1.Manager", "Collect", check=False)
    assert refused.status == 1, "a timeout is 124"
    assert ("without a password" in refused.err) == (interactive == "no")


def test_the_journal_finds_a_model_by_its_fields(people: Machine) -> None:
    found = people.run("journalctl", "-u", "flashd", "FLASHD_MODEL=open", "-o", "json", "--no-pager").out
    entries = [json.loads(line) for line in found.splitlines()]
    (made,) = [entry for entry in entries if "is a model" in entry["MESSAGE"]]
    assert made["FLASHD_BYTES"] == "1200000" and made["PRIORITY"] == "6"
    (job,) = [entry for entry in entries if entry["MESSAGE"].endswith("import of open is done")]
    assert job["FLASHD_JOB"].isdigit() and float(job["FLASHD_SECONDS"]) > 0
    people.run("flash", "load", "open")
    tiers = people.run("journalctl", "-u", "flashd", "FLASHD_TIER=host", "-o", "cat", "--no-pager").out
    assert "load of open is done" in tiers


def test_doctor_knows_the_machine(people: Machine) -> None:
    def verdicts(user: str) -> dict[str, str]:
        said = people.run_as(user, "flash", "doctor", "--json", check=False).out
        return {finding["subject"]: finding["verdict"] for finding in json.loads(said)}

    erin = verdicts("erin")
    assert (erin["daemon"], erin["service"], erin["polkit"], erin["group"]) == ("good",) * 4
    assert erin["torch engine"] == "bad", "this machine has none"
    assert verdicts("dave")["group"] == "slow"
    policy = "/usr/share/polkit-1/actions/org.flashd1.policy"
    people.run("mv", policy, "/root/policy")
    try:
        people.until(lambda: verdicts("erin")["polkit"] == "bad")
    finally:
        people.run("mv", "/root/policy", policy)


def test_a_report_has_the_journal_and_nobodys_names(people: Machine) -> None:
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
    people.run("flash", "config", "engines.vllm.arguments", '["--api-key", "swordfish"]')
    people.make_source(f"/home/erin/{token}", seed=5, owner="erin")
    people.run("truncate", "-s", "50", f"/home/erin/{token}/model.safetensors")
    assert people.run_as("erin", "flash", "import", f"/home/erin/{token}", token, check=False).status != 0
    assert token in people.journal(), "there it may stand"
    text = people.run("flash", "report", "-").out
    assert "ActiveState=active" in text
    assert "model-1" in text and "is a model" in text
    for secret in ("codename", "open/", "erin", "fred", "dave", "/home", "/root", token, "swordfish"):
        assert secret not in text, secret


def watched(machine: Machine, *lines: str) -> None:
    """The unit with a watchdog that is quick to bite."""
    folder = machine.root / "etc/systemd/system/flashd.service.d"
    folder.mkdir(exist_ok=True)
    (folder / "watchdog.conf").write_text("\n".join(["[Service]", "WatchdogSec=3", *lines]) + "\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "flashd")


def was_ended_by_the_watchdog(machine: Machine, pid: str) -> bool:
    is_another = machine.show("flashd", "MainPID") not in {pid, "0"}
    return is_another and "Watchdog timeout" in machine.run("journalctl", "-u", "flashd", "--no-pager").out


def test_a_daemon_that_is_stopped_dead_is_started_again(people: Machine) -> None:
    watched(people)
    people.run("flash", "load", "open")
    pid = people.show("flashd", "MainPID")
    people.run("kill", "-STOP", pid)
    people.until(lambda: was_ended_by_the_watchdog(people, pid), timeout_s=60)
    people.until(lambda: people.models()["open"] == "host", timeout_s=30)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_daemon_whose_streamer_is_stuck_is_started_again(people: Machine) -> None:
    """Its loop answers all the while: only somebody who looks at the transfers can tell."""
    library = people.root / "opt" / "hangs.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HANGS], check=True)
    settings = people.root / "etc/flashd/flashd.toml"
    before = settings.read_text()
    settings.write_text("[streamer]\nbackend = 'threads'\nstall_timeout_s = 3.0\n")
    watched(people, "Environment=LD_PRELOAD=/opt/hangs.so HANGS_WHILE=/run/flashd-hangs", "TimeoutAbortSec=5")
    people.run("journalctl", "--rotate")
    people.run("journalctl", "--vacuum-time=1s")
    people.run("flash", "evict", "open")
    people.run("touch", "/run/flashd-hangs")
    try:
        pid = people.show("flashd", "MainPID")
        begun = people.run("busctl", "call", "org.flashd1", "/org/flashd1", "org.flashd1.Manager", "Load", "ssa{sv}",
                           "open", "host", "0")  # fmt: skip
        assert "/job/" in begun.out
        people.until(lambda: "a transfer is stuck" in people.show("flashd", "StatusText"), timeout_s=30)
        assert "open" in people.models(), "it answers"
        people.until(lambda: was_ended_by_the_watchdog(people, pid), timeout_s=60)
    finally:
        people.run("rm", "/run/flashd-hangs")
        settings.write_text(before)
        watched(people)
    people.until(lambda: "open" in people.models())
