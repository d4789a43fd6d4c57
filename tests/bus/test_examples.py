# SPDX-License-Identifier: Apache-2.0
"""The example programs, as they are shipped: compiled, and run against a daemon with a model that says who it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import made_models
import pytest
from conftest import SAYS, Daemon, Remote, import_model
from gateways import Gateway, free_port
from safetensors.torch import load_file, save_file
from waiting import eventually

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "packaging" / "examples"


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def python(folder: Path) -> list[str | Path]:
    found = subprocess.run(["/usr/bin/python3", "-c", "import gi"], check=False, capture_output=True)
    if found.returncode:
        pytest.skip("needs python3-gi")
    return ["/usr/bin/python3", EXAMPLES / "swap_and_ask.py"]


def shell(folder: Path) -> list[str | Path]:
    needs("busctl", "curl")
    return [EXAMPLES / "swap-and-ask.sh"]


def c(folder: Path) -> list[str | Path]:
    needs("cc", "pkg-config")
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libsystemd"], capture_output=True, text=True, check=False
    )
    if flags.returncode:
        pytest.skip("needs libsystemd-dev")
    program = folder / "swap_and_ask"
    source = EXAMPLES / "swap_and_ask.c"
    warnings = ("-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined")
    subprocess.run(["cc", *warnings, source, "-o", program, *flags.stdout.split()], check=True)
    return [program]


@pytest.fixture(scope="module")
def ada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    made_models.put(folder, "ada")
    return folder / "ada"


@pytest.mark.parametrize("example", [python, shell, c], ids=["python", "shell", "c"])
async def test_it_swaps_and_asks(
    example: Callable[[Path], list[str | Path]], remote: Remote, daemon: Daemon, ada: Path, tmp_path: Path
) -> None:
    command = example(tmp_path)
    await import_model(remote, ada, "ada")
    environment = {**os.environ, "FLASHD_BUS_ADDRESS": daemon.address}

    def run(model: str, question: str) -> subprocess.CompletedProcess[str]:
        called = [*command, model, question]
        return subprocess.run(called, env=environment, capture_output=True, text=True, check=False, timeout=100)

    answered = run("ada", "Who are you?")
    assert answered.returncode == 0, answered.stderr
    assert SAYS["ada"] in answered.stdout
    quoted = run("ada", 'Who is "Ada" \\ who?')
    assert quoted.returncode == 0, quoted.stderr
    refused = run("nobody", "?")
    assert refused.returncode != 0
    assert "nobody" in refused.stderr


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_shell_one_ends_where_there_is_no_bus(shell: str, tmp_path: Path) -> None:
    needs("busctl", "curl", shell)
    command = [shell, EXAMPLES / "swap-and-ask.sh", "ada", "Who are you?"]
    environment = {**os.environ, "FLASHD_BUS_ADDRESS": f"unix:path={tmp_path}/nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and "No such file" in done.stderr


# -- three programs for people who have many models ------------------------------------------------------------------

USERS = 50


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ada and bob, carl with two layers and dora with one, and fifty fine-tunes: of even users ada's, of odd bob's."""
    folder = tmp_path_factory.mktemp("many")
    made_models.put(folder, "ada", "bob", "carl")
    shutil.copy(folder / "ada" / "chat_template.jinja", folder / "carl")
    shutil.copytree(folder / "carl", folder / "dora")
    tensors = load_file(folder / "carl" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "dora" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "carl" / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (folder / "dora" / "config.json").write_text(json.dumps(config))
    for user in range(USERS):
        own = folder / f"user-{user}"
        shutil.copytree(folder / ("bob" if user % 2 else "ada"), own)
        tensors = load_file(own / "model.safetensors")
        tensors["model.embed_tokens.weight"][0, 0] = user / 1000  # of a token that nobody says
        save_file(tensors, own / "model.safetensors", {"format": "pt"})
    return folder


def example(name: str, daemon: Daemon, *arguments: str, gateway: Gateway | None = None, asks: str = "") -> str:
    """What it prints."""
    more = {"FLASHD_URL": gateway.url} if gateway else {}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env={**os.environ, "FLASHD_BUS_ADDRESS": daemon.address, **more},
        input=asks, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


async def test_easy_questions_go_to_the_small_model(
    remote: Remote, daemon: Daemon, gateway: Gateway, many: Path
) -> None:
    for name in ("ada", "carl"):
        await import_model(remote, many / name, name)
    asks = "Who are you?\nProve that there are infinitely many primes.\nHello\n"
    printed = example("route_by_difficulty.py", daemon, "ada", "carl", gateway=gateway, asks=asks)
    assert f"Who are you?\nada: {SAYS['ada']}\n" in printed
    assert "primes.\ncarl: " in printed and "Hello\nada: Hello! Ask me who I am.\n" in printed
    assert re.search(r"^ada: 2 answers, first words after \d+\.\d+ s \(median\)$", printed, re.MULTILINE), printed


async def test_fifty_users_have_a_fine_tune_each(remote: Remote, daemon: Daemon, gateway: Gateway, many: Path) -> None:
    for user in range(USERS):
        await import_model(remote, many / f"user-{user}", f"user-{user}")
    port = free_port()
    environment = {**os.environ, "FLASHD_URL": gateway.url}
    server = subprocess.Popen([sys.executable, EXAMPLES / "finetune_per_user.py", "serve", str(port)], env=environment)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=100) as web:

            async def answers() -> bool:
                with contextlib.suppress(httpx.ConnectError):
                    return (await web.get("/")).status_code == 404
                return False

            await eventually(answers)
            unknown = await web.post("/chat", headers={"User": "nobody"}, content="Who are you?")
            assert unknown.status_code == 404 and "nobody" in unknown.text
        arguments = ("measure", f"http://127.0.0.1:{port}", str(USERS), "40")
        printed = await asyncio.to_thread(example, "finetune_per_user.py", daemon, *arguments)
    finally:
        server.terminate()
        server.wait()
    said = dict(re.findall(r"^(\d+): (.*)$", printed, re.MULTILINE))
    assert len(said) > 15, printed
    for user, text in said.items():
        assert text == SAYS["bob" if int(user) % 2 else "ada"], user
    assert f"40 answers of {len(said)} models in " in printed and "(p95)" in printed


async def test_a_robot_meets_its_deadlines(remote: Remote, daemon: Daemon, many: Path) -> None:
    names = ("ada", "carl", "dora")
    for name in names:
        await import_model(remote, many / name, name)
    # Twenty times slower than on a machine of a robot's own: tests share two cores.
    printed = await asyncio.to_thread(example, "robot.py", daemon, *names, "10", "20")
    for name in names:
        assert re.search(rf"^{name} is there after \d+\.\d+ s \((start|rebind|wake)\)$", printed, re.MULTILINE), printed
        model = await remote.model(name)
        assert model["Serving"] and model["Pinned"]
    for loop, least, deadline_ms in (("perception", 3, 4000), ("planning", 1, 20000), ("control", 5, 2000)):
        found = re.search(rf"^{loop}: (\d+) times, .*, 0 after {deadline_ms} ms$", printed, re.MULTILINE)
        assert found and int(found[1]) >= least, printed
    changed = re.search(r"^the scene changed (\d+) times$", printed, re.MULTILINE)
    assert changed and int(changed[1]) >= 2, printed
