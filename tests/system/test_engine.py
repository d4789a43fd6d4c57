# SPDX-License-Identifier: Apache-2.0
"""Real engines in the real, hardened units, in an environment installed by one command. They outlive the daemon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import made_models
import pytest
from conftest import MACHINE, ROOT, Machine, booted
from repacked import repack

from flashd.cli.wheels import requirements

SAYS = "I am Ada, the first model you dropped into the folder."
# Asks the active model several times at once, and prints how each answer ends.
ASK_LONG = """
import http.client, json, socket, sys
from concurrent.futures import ThreadPoolExecutor
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/flashd/openai.sock")
body = {"prompt": "Who are you?", "max_tokens": 200, "temperature": 5.0, "stream": True}
def ask(_):
    connection = Connection("flashd")
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline()
    print("begun", flush=True)
    return (first + answer.read()).decode().strip().splitlines()[-1]
with ThreadPoolExecutor(8) as threads:
    for end in threads.map(ask, range(8)):
        print(end, flush=True)
"""
# Asks the gateway for a model, at its address or at its socket.
ASK_GATEWAY = """
import http.client, json, socket, sys
path, model = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1:8434", timeout=120)
if path:
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 40}
connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""
CONNECT = "import socket; socket.socket(socket.AF_UNIX).connect('/run/flashd/openai.sock')"
UNIT = ROOT / "systemd" / "flashd-engine@.service"
WHEELS = "/opt/wheels"


@pytest.fixture(scope="module")
def ready(base: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with ada imported, and with a folder of PyTorch's wheels; it has no network."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not (base / "usr" / "bin" / version).exists():
        pytest.skip(f"needs a machine with {version}, for which this checkout's torch was built")
    wheels = tmp_path_factory.mktemp("wheels")
    repack(requirements("torch"), wheels)
    with booted(base, bind=f"{wheels}:{WHEELS}") as machine:
        shutil.copy(package, machine.root / "root" / "flashd.deb")
        machine.run("dpkg", "-i", "/root/flashd.deb")
        # carl has another architecture, so that it gets an engine of its own.
        made_models.put(machine.root / "root", "ada", "carl")
        shutil.copy(machine.root / "root/ada/chat_template.jinja", machine.root / "root/carl")
        machine.run("useradd", "-m", "-G", "flashd", "erin")
        machine.run("useradd", "-m", "dave")
        for name in ("ada", "carl"):
            machine.run("flash", "import", f"/root/{name}", name)
        yield machine
    shutil.rmtree(wheels)


def test_one_command_installs_what_engines_run_in_from_a_folder(ready: Machine) -> None:
    refused = ready.run("flash", "swap", "ada", check=False)
    assert refused.status != 0
    assert "flash engine install torch" in refused.err
    done = ready.run("flash", "engine", "install", "torch", "--wheels", WHEELS)
    assert "is environment 1: new engines use it" in done.err
    (made,) = json.loads(ready.run_as("dave", "flash", "engine", "list", "--json").out)
    assert (made["kind"], made["number"], made["current"], made["fits"]) == ("torch", 1, True, True)
    environments = ready.root / "var/lib/flashd/environments/torch"
    assert {path.name for path in environments.iterdir()} == {"1", "current"}
    assert ready.run_as("erin", "flash", "engine", "use", "torch", "0", check=False).status == 5


def test_a_member_swaps_and_asks(ready: Machine) -> None:
    assert SAYS in ready.run_as("erin", "flash", "run", "ada", "Who are you?").out
    ready.until(lambda: ready.show("flashd", "StatusText") == "2 models, ada answers")


def test_who_sits_at_the_screen_asks_without_being_a_member(ready: Machine) -> None:
    """The folder of the socket is closed to them: the daemon hands them a connection."""
    assert SAYS in ready.run_at_seat("dave", "flash", "run", "ada", "Who are you?").out
    assert "Permission denied" in ready.run_at_seat("dave", "ls", "/run/flashd", check=False).err


def test_a_private_model_answers_its_owner_alone(ready: Machine) -> None:
    ready.run("useradd", "-m", "-G", "flashd", "fred")
    shutil.copytree(ready.root / "root/ada", ready.root / "home/erin/secret")
    ready.run("chown", "-R", "erin:", "/home/erin/secret")
    ready.run_as("erin", "flash", "import", "--private", "/home/erin/secret", "secret")
    assert SAYS in ready.run_as("erin", "flash", "run", "secret", "Who are you?").out
    ready.until(lambda: ready.show("flashd", "StatusText") == "3 models, a private one answers")
    assert ready.run_as("fred", "flash", "run", "secret", "Who are you?", check=False).status == 3
    asked = ready.run_as("fred", "python3", "-c", CONNECT, check=False)
    assert "PermissionError" in asked.err
    assert "secret" not in ready.run_as("fred", "flash", "list", "--json").out
    assert "secret" not in ready.run_as("fred", "flash", "status", "--json").out
    assert SAYS in ready.run_as("fred", "flash", "run", "ada", "Who are you?").out
    ready.run_as("erin", "flash", "rm", "--yes", "secret")


def test_an_outsider_does_neither(ready: Machine) -> None:
    assert ready.run_as("dave", "flash", "swap", "ada", check=False).status == 5
    asked = ready.run_as("dave", "sh", "-c", "ls /run/flashd", check=False)
    assert "Permission denied" in asked.err


def engines(machine: Machine) -> dict[str, tuple[str, int]]:
    """State and process of each model's engine."""
    listed = json.loads(machine.run("flash", "status", "--json").out)
    return {entry["model"]: (entry["state"], entry["pid"]) for entry in listed if entry.get("model") in {"ada", "carl"}}


def test_the_engine_is_another_user_without_privileges_and_shut_in(ready: Machine) -> None:
    ready.run("flash", "swap", "ada")
    pid = engines(ready)["ada"][1]
    assert ready.run("stat", "-c", "%U", f"/proc/{pid}").out.strip() == "flashd-engine"
    status = ready.run("cat", f"/proc/{pid}/status").out
    assert "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status
    devices = ready.run("cat", f"/proc/{pid}/net/dev").out
    assert "eth" not in devices and "host" not in devices
    unit = ready.run("cat", f"/proc/{pid}/cgroup").out
    assert "/flashd-engine@" in unit
    uid = ready.run("id", "-u", "flashd-engine").out.strip()

    def inside(*command: str) -> str:
        """What its user is told where it is."""
        entered = ready.run("nsenter", "-t", str(pid), "-m", "-n", "-S", uid, "-G", uid, "--", *command, check=False)
        return entered.out + entered.err

    assert inside("ls", "/var/lib/flashd").split() in ([], ["environments"])
    for closed in ("/run/flashd", "/run/dbus", "/etc/flashd", "/home/erin"):
        assert "Permission denied" in inside("ls", closed) or "No such file" in inside("ls", closed), closed
    assert "Read-only file system" in inside("touch", "/usr/flashd", "/var/flashd")
    assert "unreachable" in inside("python3", "-c", "import socket; socket.create_connection(('192.0.2.1', 80), 5)")


def test_only_the_daemon_may_ask_for_processes(ready: Machine) -> None:
    ask = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('/run/flashd-engine.socket')"
    assert "PermissionError" in ready.run_as("erin", "python3", "-c", ask, check=False).err


def test_the_units_are_well_shut_in(ready: Machine) -> None:
    (unit,) = ready.run(
        "sh", "-c", "systemctl list-units --plain --no-legend 'flashd-engine@*' | cut -d' ' -f1"
    ).out.split()
    exposure = ready.run("systemd-analyze", "security", "--no-pager", unit).out
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", exposure)
    assert found is not None and float(found[1]) <= 1.5, exposure
    comments = "".join(line for line in UNIT.read_text().splitlines() if line.startswith("#"))
    relaxed = re.findall(r"^✗ (?:\w+=~@?)?(\w+)", exposure, re.MULTILINE)
    assert [name for name in relaxed if not re.search(rf"\b{name}", comments)] == [], "is not explained"
    verified = ready.run("systemd-analyze", "--man=no", "verify", "flashd-engine.socket", unit)
    assert verified.err == ""


def test_the_gateway_serves_models_by_name_and_is_shut_in(ready: Machine) -> None:
    """Models that nobody swapped to, for users who are no members; its socket is for members."""
    ready.run("systemctl", "start", "flashd-gateway.socket")
    answer = ready.run_as("dave", "python3", "-c", ASK_GATEWAY, "", "ada").out
    assert answer.startswith("200 ") and SAYS in answer
    assert ready.run_as("dave", "python3", "-c", ASK_GATEWAY, "", "carl").out.startswith("200 ")
    (by_socket, refused) = (
        ready.run_as(user, "python3", "-c", ASK_GATEWAY, "/run/flashd-gateway.sock", "ada", check=False)
        for user in ("erin", "dave")
    )
    assert SAYS in by_socket.out and "PermissionError" in refused.err
    assert ready.show("flashd-gateway", "User") == "flashd-gateway"
    exposure = ready.run("systemd-analyze", "security", "--no-pager", "flashd-gateway.service").out
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", exposure)
    assert found is not None and float(found[1]) <= 1.5, exposure
    units = ("flashd-gateway.socket", "flashd-gateway.service")
    assert ready.run("systemd-analyze", "--man=no", "verify", *units).err == ""
    ready.run("systemctl", "stop", *units)


@pytest.mark.parametrize("how", ["kill", "restart", "upgrade"])
def test_engines_outlive_the_daemon(ready: Machine, newer: Path, how: str) -> None:
    """One serves, one is parked, and somebody is being answered."""
    for name in ("ada", "carl"):
        ready.run("flash", "swap", name)
    before, tiers = engines(ready), ready.models()
    assert {model: state for model, (state, _) in before.items()} == {"carl": "serving", "ada": "parked"}
    daemon = ready.show("flashd", "MainPID")
    command = [MACHINE, "run", ready.name, "python3", "-u", "-c", ASK_LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "begun\n"
        if how == "kill":
            ready.run("systemctl", "kill", "-s", "KILL", "flashd")
        elif how == "restart":
            ready.run("systemctl", "restart", "flashd")
        else:
            shutil.copy(newer, ready.root / "root" / "newer.deb")
            ready.run("dpkg", "-i", "/root/newer.deb")
        ready.until(lambda: ready.show("flashd", "MainPID") not in {daemon, "0"})
        ready.until(lambda: ready.show("flashd", "ActiveState") == "active")
        assert engines(ready) == before and ready.models() == tiers
        since, until = (
            int(ready.show("flashd", f"{moment}TimestampMonotonic")) for moment in ("ExecMainStart", "ActiveEnter")
        )
        print(f"known {(until - since) / 1e6:.2f} s after it was started")
        assert until - since < 5e6, "who is ready knows its engines"
        ends = [line for line in asking.stdout.read().splitlines() if line != "begun"]
    assert ends == ["data: [DONE]"] * 8
    said = ready.run("flash", "swap", "ada")
    assert "(wake," in said.out + said.err
    assert SAYS in ready.run_as("erin", "flash", "run", "ada", "Who are you?").out
    assert {pid for _, pid in engines(ready).values()} == {pid for _, pid in before.values()}


def test_they_end_when_the_service_is_stopped(ready: Machine) -> None:
    pids = [pid for _, pid in engines(ready).values()]
    assert pids
    ready.run("systemctl", "stop", "flashd")
    ready.until(lambda: alive(ready, pids) == [])
    assert SAYS in ready.run_as("erin", "flash", "run", "ada", "Who are you?").out


def alive(machine: Machine, pids: list[int]) -> list[int]:
    return [pid for pid in pids if machine.run("test", "-e", f"/proc/{pid}", check=False).status == 0]
