# SPDX-License-Identifier: Apache-2.0
"""`flash` as people and scripts use it, against a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Daemon
from safetensors.numpy import load_file, save_file
from waiting import PATIENCE_S, until

import flashd
from flashd import errors
from flashd.dbus import wire
from flashd.dbus.connection import connect
from flashd.dbus.wire import DBUS, DBUS_PATH
from flashd.units import MiB

FLASH = Path(sys.executable).with_name("flash")


def flash(*arguments: str | Path, bus: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FLASH, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=PATIENCE_S,
        env={**os.environ, "FLASHD_BUS_ADDRESS": bus, **environment},
    )  # fmt: skip


Flash = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(daemon: Daemon) -> Flash:
    def bound(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return flash(*arguments, bus=daemon.address)

    return bound


def source(folder: Path, seed: int = 0, rows: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"w": np.random.default_rng(seed).standard_normal((rows, 64), np.float32)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    return folder


def test_entries_that_are_no_models_and_a_folder_that_is_gone_are_told(run: Flash, daemon: Daemon) -> None:
    (daemon.models / "empty").mkdir()
    until(lambda: "ignored\tempty (an empty folder)\n" in run("status").stdout)
    assert "Ignored in there: empty (an empty folder)\n" in run("list").stderr
    assert "ignored, because they are no models: empty (an empty folder)\n" in run("doctor").stdout
    shutil.rmtree(daemon.models)
    until(lambda: f"problem\t{daemon.models}: it does not exist" in run("status").stdout)
    doctor = run("doctor")
    assert doctor.returncode == 1 and f"bad state: {daemon.models}: it does not exist" in doctor.stdout
    assert f"mkdir -p {daemon.models}" in doctor.stdout and "inbox" not in doctor.stdout
    daemon.models.mkdir()
    until(lambda: "problem" not in run("status").stdout)


def test_config_says_when_a_setting_is_in_force_and_how_a_list_is_written(run: Flash, daemon: Daemon) -> None:
    assert run("config", "engines.idle_timeout_s", "60").stderr == "engines.idle_timeout_s = 60, in force now\n"
    assert run("config", "engines.idle_timeout_s").stdout == "60.0\n"
    later = run("config", "engines.max_parked", "3")
    assert later.stderr == "engines.max_parked = 3; takes effect after flash restart\n"
    shown = run("config", "engines.max_parked")
    assert shown.stdout == "2\n" and shown.stderr == "engines.max_parked = 3 takes effect after flash restart\n"
    assert run("config", "engines.idle_timeout_s").stderr == ""
    drop_in = daemon.config.with_name(daemon.config.name + ".d") / "zzz.toml"
    drop_in.write_text("engines.max_parked = 'lots'\n")
    shown = run("config", "engines.max_parked")
    assert shown.stdout == "2\n" and shown.returncode == 0
    assert "whether a restart changes engines.max_parked is not known: " in shown.stderr and "zzz.toml" in shown.stderr
    drop_in.unlink()
    for written, meant in ({"127.0.0.1:1": ["127.0.0.1:1"], "['127.0.0.1:1', \"[::1]:2\"": ["127.0.0.1:1", "[::1]:2"],
                            "[a b,c]": ["a b", "c"], "": []}).items():  # fmt: skip
        wrong = run("config", "gateway.addresses", written)
        assert wrong.returncode == errors.InvalidArgument.exit_status
        command = wrong.stderr.partition("write it like this: flash ")[2]
        right = run(*shlex.split(command))
        assert right.returncode == 0, right.stderr
        settings = tomllib.loads((daemon.config.with_suffix(".toml.d") / "zz-flash-config.toml").read_text())
        assert settings["gateway"]["addresses"] == meant


def test_a_file_that_many_models_have_needs_a_name(run: Flash, tmp_path: Path) -> None:
    file = source(tmp_path / "tune") / "model.safetensors"
    refused = run("import", file)
    assert refused.returncode == errors.InvalidArgument.exit_status
    assert f"import its whole folder: flash import {tmp_path}/tune, or" in refused.stderr
    assert run("import", file, "tune").returncode == 0


def test_import_list_show_pin_alias_verify_scrub_and_rm(run: Flash, tmp_path: Path) -> None:
    assert "No models yet. Drop one into" in run("list").stderr
    assert json.loads(run("list", "--json").stdout) == []
    imported = run("import", source(tmp_path / "my-tune"), "Me/Tune", "--alias", "tune")
    assert imported.returncode == 0 and "Me/Tune: 16.4 kB" in imported.stderr
    (line,) = run("list").stdout.splitlines()
    assert line.split("\t")[1:3] == ["Me/Tune", "16.4 kB"]
    (listed,) = json.loads(run("list", "--json").stdout)
    assert listed["aliases"] == ["tune"] and listed["residency"] == "stored"
    assert json.loads(run("show", "tune", "--json").stdout)["name"] == "Me/Tune"
    shown = " ".join(run("show", "me/tune").stdout.split())
    assert "NoSuchForCausalLM" in shown and "engine torch: there is no GPU" in shown
    for command in (("pin", "tune"), ("alias", "tune", "x", "y"), ("verify", "x"), ("scrub",), ("unpin", "y")):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert json.loads(run("scrub", "--json").stdout) == {"checked": 1, "corrupt": [], "size_bytes": 16384}
    refused = run("rm", "x")
    assert refused.returncode == errors.InvalidArgument.exit_status and "--yes" in refused.stderr
    assert "x" in run("list").stdout
    assert run("rm", "--yes", "x").returncode == 0
    assert run("list").stdout == ""


def test_load_evict_status_top_and_jobs(run: Flash, tmp_path: Path) -> None:
    run("import", source(tmp_path / "a"))
    loaded = run("load", "a")
    assert loaded.returncode == 0 and "host tier" in loaded.stderr
    assert run("list").stdout.split("\t")[3] == "host"
    status = run("status")
    assert "none: flash swap MODEL" in status.stdout
    manager, device = json.loads(run("status", "--json").stdout)
    assert manager["active_model"] == "" and device["used_bytes"] > 0
    assert "host" in run("top", "--once").stdout
    assert run("evict", "a").returncode == 0
    assert run("list").stdout.split("\t")[3] == "stored"
    jobs = json.loads(run("jobs", "--json").stdout)
    assert [(job["kind"], job["state"]) for job in jobs] == [("import", "done"), ("load", "done")]
    assert len(run("jobs").stdout.splitlines()) == 2


def test_a_swap_that_cannot_work_says_why_with_its_status(run: Flash, tmp_path: Path) -> None:
    run("import", source(tmp_path / "a"))
    for command in (("swap", "a"), ("run", "a", "hello")):
        failed = run(*command)
        assert failed.returncode == errors.EngineFailed.exit_status, failed.stderr
        assert "NoSuchForCausalLM" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("show", "nope"), errors.NotFound, "there is no model 'nope'"),
        (("swap", "nope"), errors.NotFound, "flash list"),
        (("config", "memory.host_budgt", "1GB"), errors.InvalidArgument, "did you mean memory.host_budget?"),
        (("config", "memory.host_budget", "lots"), errors.InvalidArgument, "not a size"),
        (("cancel", "77"), errors.NotFound, "77"),
        (("park",), errors.NotFound, "no model is active"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_answered_with_a_remedy_and_their_status(
    arguments: tuple[str, ...], error: type[errors.FlashdError], words: str, run: Flash
) -> None:
    done = run(*arguments)
    assert done.returncode == error.exit_status, done.stderr
    assert words in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_without_a_daemon_every_command_says_how_to_start_one(tmp_path: Path) -> None:
    nowhere = f"unix:path={tmp_path}/nothing"
    for command in ("list", "status", "jobs", "stop", "top", "watch"):
        done = flash(command, bus=nowhere)
        assert done.returncode == errors.Unavailable.exit_status and "flash start" in done.stderr, command


def test_usage_errors_are_status_2(tmp_path: Path) -> None:
    for arguments in (("swap",), ("no-such-command",), ("list", "--no-such-option"), ("import", tmp_path / "gone")):
        assert flash(*arguments).returncode == 2
    help_text = flash("--help", COLUMNS="200").stdout
    for cls in errors.FlashdError.__subclasses__():
        assert f"{cls.exit_status} " in help_text
    assert flash("--version").stdout == f"flash {flashd.__version__}\n"


def test_config_shows_changes_and_explains(run: Flash) -> None:
    assert "[store]" in run("config").stdout
    changed = run("config", "inbox.on_remove", "remove")
    assert changed.returncode == 0 and "flash restart" not in changed.stderr
    assert run("config", "inbox.on_remove").stdout == "remove\n"
    assert "flash restart" in run("config", "memory.host_budget", "2GB").stderr
    assert run("config", "models.Qwen/Qwen3-0.6B.engine").stdout == "default\n"
    assert "flash restart" not in run("config", "models.Qwen/Qwen3-0.6B.engine", "vllm").stderr
    assert run("config", "models.Qwen/Qwen3-0.6B.engine").stdout == "vllm\n"
    for key in ("engines.warm_new", "engines.vllm.arguments"):  # shown values are accepted as input
        shown = run("config", key).stdout.strip()
        assert shown in {"true", "false", "[]"} and run("config", key, shown).returncode == 0
    keys = {setting["key"] for setting in json.loads(run("config", "--json").stdout)}
    assert {"memory.host_budget", "inbox.settle_s"} <= keys


def test_convert_needs_no_daemon_and_other_tools_open_the_result(tmp_path: Path) -> None:
    made = source(tmp_path / "source")
    done = flash("convert", made, tmp_path / "out", bus="unix:path=/nowhere")
    assert done.returncode == 0, done.stderr
    assert (load_file(tmp_path / "out/model.safetensors")["w"] == load_file(made / "model.safetensors")["w"]).all()
    again = flash("convert", made, tmp_path / "out")
    assert again.returncode == errors.AlreadyExists.exit_status
    (made / "model.safetensors").write_bytes(b"nonsense" * 4)
    for long in ("a" * 300, "a" * 250, f"{'a' * 300}/out"):  # the second one is too long only with what is added to it
        refused = flash("convert", made, tmp_path / long)
        assert refused.returncode == errors.InvalidArgument.exit_status, refused.stderr
        assert "cannot create" in refused.stderr or "is not a folder" in refused.stderr
    failed = flash("convert", made, tmp_path / "other")
    assert failed.returncode == errors.InvalidSource.exit_status
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}, "nothing is left behind"


def test_a_hostile_source_changes_nothing(run: Flash, tmp_path: Path) -> None:
    folder = source(tmp_path / "bad")
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    failed = run("import", folder)
    assert failed.returncode == errors.InvalidSource.exit_status and "claims a header" in failed.stderr
    assert run("list").stdout == ""


def test_a_dropped_source_that_fails_is_shown(run: Flash, daemon: Daemon) -> None:
    folder = source(daemon.models / "bad")
    (folder / "model.safetensors").write_bytes(b"nonsense" * 4)
    until(lambda: "failed bad" in run("list").stderr)
    asked = run("swap", "bad")
    assert asked.returncode == errors.NotFound.exit_status
    assert "'bad' is not a model yet, it is failed: " in asked.stderr and "holds no weights" in asked.stderr


def test_what_is_not_there_is_named_in_words(run: Flash) -> None:
    refused = run("cancel", "99")
    assert refused.returncode == errors.NotFound.exit_status
    assert "there is no job 99" in refused.stderr and "/org/" not in refused.stderr


def test_ctrl_c_cancels_the_job(daemon: Daemon, run: Flash, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    save_file({"w": np.zeros((1024, MiB), np.uint8)}, big / "model.safetensors")
    process = subprocess.Popen(
        [FLASH, "import", big], env={**os.environ, "FLASHD_BUS_ADDRESS": daemon.address}, stderr=subprocess.PIPE
    )
    with process, flashd.connect(daemon.address) as client:  # asked through the CLI, the job might be over meanwhile
        while not any(job.state == "running" for job in client.jobs()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE_S) == errors.Cancelled.exit_status
        assert process.stderr and b"cancelled" in process.stderr.read()
    (job,) = json.loads(run("jobs", "--json").stdout)
    assert job["state"] == "cancelled" and run("list").stdout == ""


def test_a_closed_pipe_is_no_error(daemon: Daemon, run: Flash, tmp_path: Path) -> None:
    run("import", source(tmp_path / "a"))
    done = subprocess.run(
        f"{FLASH} show a --json | true", shell=True, capture_output=True, text=True, check=False,
        env={**os.environ, "FLASHD_BUS_ADDRESS": daemon.address},
    )  # fmt: skip
    assert done.stderr == ""


def test_watch_tells_of_what_happens(daemon: Daemon, run: Flash, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [FLASH, "watch", "--json"], stdout=subprocess.PIPE, env={**os.environ, "FLASHD_BUS_ADDRESS": daemon.address}
    )
    with process:
        time.sleep(1.0)
        run("import", source(tmp_path / "a"))
        assert process.stdout
        seen: list[Any] = []
        wanted = {("added", "org.flashd1.Model"), ("added", "org.flashd1.Job"), ("finished", "org.flashd1.Job")}
        while not wanted <= {(event["kind"], event["interface"]) for event in seen}:
            seen.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE_S)


def test_colours_only_on_a_terminal(daemon: Daemon, run: Flash, tmp_path: Path) -> None:
    run("import", source(tmp_path / "a"))
    assert "\x1b" not in run("list").stdout + run("show", "nope").stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [FLASH, "list"], stdout=theirs, stderr=theirs, stdin=theirs,
        env={**os.environ, "FLASHD_BUS_ADDRESS": daemon.address, "TERM": "xterm-256color", "NO_COLOR": ""},
    )  # fmt: skip
    os.close(theirs)
    process.wait(timeout=PATIENCE_S)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "\x1b[" in shown and "model" in shown, "a heading, in bold"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_every_shell_knows_the_models(shell: str, daemon: Daemon, run: Flash, tmp_path: Path) -> None:
    for name in ("my-tune", "my:tune", r"my [tune] \$(id) `id`"):
        run("import", source(tmp_path / name))
    words = "flash swap my"
    environment = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    done = flash(bus=daemon.address, _FLASH_COMPLETE=f"complete_{shell}", **environment[shell])
    offered = re.sub(r"_arguments '\*: :\(\((.*)\)\)'", r"\1", done.stdout.strip()).replace('"', "").split("\n")
    assert offered == ["my-tune"], "names that the shell would split or evaluate are not offered"
    script = flash(_FLASH_COMPLETE=f"source_{shell}").stdout
    assert "flash" in script and "_FLASH_COMPLETE" in script


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    """A user with nothing: no session bus, and no configuration but for what would disturb other tests."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fh-") as folder:
        settings = settings_of(folder)
        settings.parent.mkdir(parents=True)
        # Other tests have a gateway at the same time, and torch takes five seconds of a processor.
        settings.write_text('[gateway]\naddresses = ["127.0.0.1:0"]\n[engines]\nwarm_up = false\n')
        yield {
            "HOME": folder, "XDG_RUNTIME_DIR": folder, "DBUS_SESSION_BUS_ADDRESS": "", "XDG_STATE_HOME": "",
            "XDG_CONFIG_HOME": "", "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere",
        }  # fmt: skip


def test_start_and_stop_where_there_is_no_bus(home: dict[str, str]) -> None:
    started = flash("start", **home)
    try:
        assert started.returncode == 0, started.stderr
        assert "drop a model into" in started.stderr and f"{home['HOME']}/models" in started.stderr
        assert "already running" in flash("start", **home).stderr
        doctor = flash("doctor", "--json", **home)
        verdicts = {finding["subject"]: finding["verdict"] for finding in json.loads(doctor.stdout)}
        assert verdicts["daemon"] == "good" and verdicts["io_uring"] in {"good", "slow"}
        assert doctor.returncode == (1 if "bad" in verdicts.values() else 0)
        shutil.copytree(source(Path(home["HOME"]) / "elsewhere"), Path(home["HOME"]) / "models" / "tune")
        until(lambda: "tune" in flash("list", **home).stdout)
        before = daemon_of(home)
        os.kill(before, signal.SIGKILL)
        until(lambda: daemon_of(home) not in {0, before})
        assert flash("config", "engines.max_parked", "3", **home).stderr.endswith("flash restart\n")
        assert flash("restart", **home).returncode == 0
        assert flash("config", "engines.max_parked", **home).stdout == "3\n"
    finally:
        stopped = flash("stop", **home)
    assert stopped.returncode == 0, stopped.stderr
    assert flash("status", **home).returncode == errors.Unavailable.exit_status
    assert not (Path(home["XDG_RUNTIME_DIR"]) / "flashd").exists(), "nothing of it is left"
    until(lambda: not processes_of(home))


def settings_of(home: str) -> Path:
    return Path(home) / ".config" / "flashd" / "flashd.toml"


def listed_by_gateway(home: dict[str, str]) -> list[str]:
    """The models that the gateway of a home lists; none if there is no gateway."""
    at = f"{home['XDG_RUNTIME_DIR']}/flashd/gateway.sock"
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(at):
            return []
    transport = httpx.HTTPTransport(uds=at, verify=False)
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        return [model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]]


def gateways_of(home: dict[str, str]) -> list[int]:
    """The processes of its gateways, without their keepers."""
    return [pid for pid, command in processes_of(home).items() if re.match(r"\S*python\S* -m flashd.gateway", command)]


def test_start_starts_the_gateway_which_is_kept_running_and_stopped(home: dict[str, str]) -> None:
    started = flash("start", **home)
    try:
        assert started.returncode == 0
        found = re.search(r"programs use it at (http://127\.0\.0\.1:[1-9]\d+)/v1", started.stderr)
        assert found is not None and f"a browser shows it: {found[1]}/\n" in started.stderr
        assert httpx.get(found[1] + "/health").json()["status"] == "ok"
        flash("import", str(source(Path(home["HOME"]) / "tune")), "tune", **home)
        until(lambda: listed_by_gateway(home) == ["tune"])
        (first,) = gateways_of(home)
        assert "already running" in flash("start", **home).stderr and gateways_of(home) == [first]
        os.kill(first, signal.SIGKILL)
        until(lambda: gateways_of(home) not in ([], [first]))
        until(lambda: listed_by_gateway(home) == ["tune"])
        kept = gateways_of(home)
        assert flash("restart", **home).returncode == 0 and gateways_of(home) == kept
        until(lambda: listed_by_gateway(home) == ["tune"])
        assert flash("config", "gateway.addresses", '["localhost:0", "127.0.0.1:0"]', **home).returncode == 0
        assert flash("restart", **home).stderr.count("/v1") == 2
        assert listed_by_gateway(home) == ["tune"] and len(gateways_of(home)) == 1 and gateways_of(home) != kept
        assert flash("config", "gateway.addresses", "[]", **home).returncode == 0
        assert "http" not in flash("restart", **home).stderr and gateways_of(home) == []
    finally:
        stopped = flash("stop", **home)
    assert stopped.returncode == 0, stopped.stderr
    until(lambda: not processes_of(home))


def test_stop_says_what_it_waits_for(home: dict[str, str]) -> None:
    assert flash("start", **home).returncode == 0
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(f"{home['XDG_RUNTIME_DIR']}/flashd/gateway.sock")
        asking.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
        stop = subprocess.Popen([FLASH, "stop"], env={**os.environ, **home}, stderr=subprocess.PIPE, text=True)
        assert stop.stderr is not None
        said = stop.stderr.readline()
    assert said == "waiting for the gateway: requests that it is answering may finish, for 10 s at most\n"
    assert stop.communicate()[1].endswith("flashd has stopped\n") and stop.returncode == 0
    until(lambda: not processes_of(home))


def test_two_starts_at_once_start_one_daemon(home: dict[str, str]) -> None:
    with ThreadPoolExecutor() as threads:
        starts = [threads.submit(flash, "start", **home) for _ in range(3)]
    try:
        for start in starts:
            assert start.result().returncode == 0 and "flashd is " in start.result().stderr, start.result().stderr
        programs = list(processes_of(home).values())
        assert sum("flashd-keeper" not in program and "flashd.daemon.main" in program for program in programs) == 1
        assert len(gateways_of(home)) == 1 and "warning" not in "".join(start.result().stderr for start in starts)
        assert "programs  http://127.0.0.1:" in re.sub(r"[\t ]+", "  ", flash("status", **home).stdout)
    finally:
        assert flash("stop", **home).returncode == 0
    until(lambda: not processes_of(home))


def test_of_several_addresses_those_that_can_be_are_served(home: dict[str, str]) -> None:
    def refused_ones() -> list[str]:
        rows = [line.split("\t") for line in flash("status", **home).stdout.splitlines()]
        return [why for name, why in rows if name == "not served"]

    other = socket.socket()
    other.bind(("127.0.0.1", 0))
    other.listen()
    taken = f"127.0.0.1:{other.getsockname()[1]}"
    settings_of(home["HOME"]).write_text(f'[gateway]\naddresses = ["127.0.0.1:0", "{taken}", "0.0.0.0:0"]\n')
    started = flash("start", **home)
    try:
        assert started.returncode == 0 and started.stderr.count("warning:") == 2, started.stderr
        (url,) = re.findall(r"(http://127\.0\.0\.1:[1-9]\d+)/v1", started.stderr)
        refused = httpx.get(url + "/health").json()["refused"]
        assert [each["address"] for each in refused] == [taken, "0.0.0.0:0"]
        of_port, of_network = refused_ones()
        assert f"cannot listen at {taken}" in of_port and "0.0.0.0:0 can be reached" in of_network
        assert "flash token new" in of_network
        log = Path(home["HOME"]) / ".local/state/flashd/flashd-gateway.log"
        assert log.read_text().count("not served: ") == 2
        before = gateways_of(home)
        assert flash("start", **home).stderr.count("warning:") == 2 and gateways_of(home) == before
        other.close()
        again = flash("restart", **home)
        assert f"http://{taken}/v1" in again.stderr and again.stderr.count("warning:") == 1
        assert len(refused_ones()) == 1
    finally:
        other.close()
        assert flash("stop", **home).returncode == 0
    until(lambda: not processes_of(home))


def test_a_port_that_is_taken_is_said_and_the_daemon_runs(home: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        settings_of(home["HOME"]).write_text(f'[gateway]\naddresses = ["{taken}"]\n')
        started = flash("start", **home)
        try:
            assert started.returncode == 0 and "flashd is running" in started.stderr
            assert taken in started.stderr and "gateway.addresses" in started.stderr
            assert gateways_of(home) == []
        finally:
            flash("stop", **home)
    until(lambda: not processes_of(home))


def daemon_of(home: dict[str, str]) -> int:
    """Its process, or 0 while there is none."""
    with contextlib.suppress(errors.FlashdError):
        socket_path = Path(home["XDG_RUNTIME_DIR"]) / "flashd" / "bus"

        async def asked() -> int:
            connection = await connect(f"unix:path={socket_path}")
            try:
                who = (DBUS, DBUS_PATH, DBUS, "GetConnectionUnixProcessID", "s", [wire.BUS_NAME])
                return int((await connection.call(*who)).body[0])
            finally:
                await connection.close()

        return asyncio.run(asked())
    return 0


def processes_of(home: dict[str, str]) -> dict[int, str]:
    """The command lines of what runs with this home: keeper, daemon, bus, engines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={home['HOME']}\0".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def test_a_start_that_fails_quotes_only_itself_and_says_what_to_do(home: dict[str, str]) -> None:
    settings = settings_of(home["HOME"])
    settings.write_text("[engins]\n")
    assert "engins" in flash("start", **home).stderr
    settings.unlink()
    gone = flash("start", **home, FLASHD_BUS_ADDRESS="unix:path=/nonexistent/bus")
    assert gone.returncode == errors.Unavailable.exit_status
    assert "from FLASHD_BUS_ADDRESS" in gone.stderr and "engins" not in gone.stderr


def test_doctor_without_a_daemon_says_so_and_looks_at_the_rest(home: dict[str, str]) -> None:
    done = flash("doctor", **home)
    assert done.returncode == 1 and "flash start" in done.stdout and "O_DIRECT" in done.stdout


def test_a_report_helps_and_tells_nothing_that_is_not_for_strangers(
    daemon: Daemon, tmp_path: Path, home: dict[str, str]
) -> None:
    """Everything that somebody might have to hide is somewhere in what the report is made of."""
    hide = {"HOME": str(tmp_path), "HF_TOKEN": "hf_" + "x" * 30}
    bus = daemon.address
    folder = source(tmp_path / "project-falcon")
    assert flash("import", str(folder), "falcon/secret", "--alias", "merger", bus=bus, **hide).returncode == 0
    broken = source(tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 50)
    arguments = '["--api-key", "swordfish", "--chat-template", "You are a pirate"]'
    assert flash("config", "engines.vllm.arguments", arguments, bus=bus).returncode == 0
    assert flash("config", "engines.vllm.environment", '["NCCL_COMM_ID=halibut"]', bus=bus).returncode == 0
    written = tmp_path / "report.txt"
    assert daemon.stop() == 0
    daemon.start()
    assert flash("import", str(broken), "takeover", bus=bus, **hide).returncode != 0
    for name in ("acquisition of initech", "whale-" * 40, "me\u202eger\n"):  # one that fails, and two without a name
        shutil.copytree(broken, daemon.models / name)
    with flashd.connect(bus) as client:
        until(lambda: sum(item.state == "failed" for item in client.status().inbox_items) == 3)
        (daemon.models / "lawsuit notes").mkdir()
        until(lambda: client.status().inbox_strays)
    done = flash("report", str(written), bus=bus, **hide)
    assert done.returncode == 0, done.stderr
    assert written.stat().st_mode & 0o777 == 0o600
    text = written.read_text()
    secrets = ["falcon", "merger", "takeover", "swordfish", "pirate", "halibut", str(tmp_path), hide["HF_TOKEN"]]
    secrets += [
        "acquisition",
        "initech",
        "whale",
        "lawsuit",
        r"me\u202eger",
        str(daemon.root),
        socket.gethostname(),
        "hf_",
    ]
    assert [secret for secret in secrets if secret in text] == []
    for helps in ("== versions ==", "== doctor ==", "Linux", "io_uring", "import failed", "Error.InvalidSource",
                  "state=failed", "engines.max_parked = 2", "dtype=F32", "engines.vllm.arguments = [set]"):  # fmt: skip
        assert helps in text, text
    assert flash("report", str(written), bus=bus).returncode == errors.AlreadyExists.exit_status
    assert "== doctor ==" in flash("report", "-", **home).stdout, "without a daemon, when it is needed most"


def test_a_private_model_and_back(daemon: Daemon, tmp_path: Path) -> None:
    bus = daemon.address
    folder = source(tmp_path / "one")
    assert flash("import", "--private", str(folder), "one", bus=bus).returncode == 0
    assert ", private" in flash("show", "one", bus=bus).stdout
    assert flash("public", "one", bus=bus).returncode == 0
    assert ", private" not in flash("show", "one", bus=bus).stdout
    assert flash("private", "one", bus=bus).returncode == 0
    assert json.loads(flash("show", "one", "--json", bus=bus).stdout)["private"] is True


@pytest.mark.parametrize("when", ["while it imports", "while it waits"])
def test_ctrl_c_shows_no_traceback(daemon: Daemon, when: str) -> None:
    environment = {**os.environ, "FLASHD_BUS_ADDRESS": daemon.address, "PYTHONPROFILEIMPORTTIME": "1"}
    process = subprocess.Popen(
        [FLASH, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    last = "flashd.cli.quick" if when == "while it imports" else "flashd.client.client"
    imported = next(line for line in process.stderr if line.endswith(f" {last}\n"))
    if when == "while it waits":
        with flashd.connect(daemon.address) as client:
            begun = threading.Event()

            def change() -> None:
                """Until it has said something, which it does when it is connected."""
                while not begun.wait(0.05):
                    client.set_config("engines.spare", "1MiB")
                    client.scrub()

            changing = threading.Thread(target=change)
            changing.start()
            assert process.stdout is not None and process.stdout.readline()
            begun.set()
            changing.join()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert imported and process.returncode != 0 and "Traceback" not in said and "Exception" not in said, said
