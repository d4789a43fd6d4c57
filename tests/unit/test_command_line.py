# SPDX-License-Identifier: Apache-2.0
"""The quick parser of command lines agrees with typer, and quick commands import little."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashd.cli import app as by_typer
from flashd.cli import commands, quick
from flashd.cli.parameters import Group

WORDS = [
    *("a", "b/c", "-", "--", "", "1", "0", "-1", "0.5", "1e3", "7", "torch", "vllm", "/", "/dev/null", "/nowhere", "ü"),
    *("--json", "--yes", "-y", "-yy", "--engine", "--engine=vllm", "--engine=", "--alias", "--alias=x", "--private"),
    *("--public", "--no-replace", "--max-tokens", "--max-tokens=0", "--temperature", "--seed=3", "--raw", "--no-raw"),
    *("--explain", "--tier", "--device=cuda:0", "--wheels", "--runs", "--runs=9", "--help", "--nope", "--jso", "--bus"),
]
PLAIN = [
    *(
        "list",
        "list --json",
        "ls",
        "models",
        "status --json",
        "jobs",
        "watch",
        "park",
        "scrub",
        "start",
        "doctor --json",
    ),
    *("swap ada", "swap --engine vllm ada", "swap ada --engine=vllm", "run ada who are you", "run ada -", "show b/c"),
    *(
        "run ada --max-tokens 9 --temperature 0.5 --system x hello",
        "alias ada x y",
        "alias ada",
        "rm -y a b",
        "cancel 7",
    ),
    *("config", "config a", "config a b", "engine list", "engine use torch 3", "engine install vllm", "import / x"),
    *("import / --alias a --alias b", "--bus session list", "bench stream /dev/null --runs=9", "bench swap a b"),
    *("evict a", "pin a", "load a --tier device", "report", "report -", "convert / /nowhere"),
]


def typed(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., None], dict[str, Any]] | None:
    """The function that typer calls for this line, and with what; None if it calls none."""
    called: list[tuple[Callable[..., None], dict[str, Any]]] = []

    def recorded(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def record(**values: Any) -> None:
            called.append((function, values))

        return record

    def found(name: str) -> Callable[..., None] | Group:
        command = commands.found(name)
        if not isinstance(command, Group):
            return recorded(command)
        group = Group(help=command.help)
        for below, function in command.commands.items():
            group.command(below)(recorded(function))
        return group

    with monkeypatch.context() as patched:
        patched.setattr(by_typer, "found", found)
        try:
            typer.main.get_command(by_typer.app).main(list(words), prog_name="flash", standalone_mode=False)
        except (Exception, SystemExit):  # noqa: BLE001 -- whatever it refuses it with
            return None
    return called[0] if called else None


def assert_same(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the line is plain; if it is, typer reads it in the same way."""
    call = quick.read(words)
    if call is None:
        return False
    expected = typed(words, monkeypatch)
    assert expected is not None, f"typer refuses {words}"
    function, values = expected
    assert call.function is function
    context = values.pop(call.context_name, None)
    if context is not None:
        assert call.bus == context.obj.bus
    defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
    shown = {name: call.values.get(name, defaults[name]) for name in values}
    assert shown == values and set(call.values) <= set(values)
    assert [type(value) for value in shown.values()] == [type(value) for value in values.values()]
    return True


@pytest.mark.parametrize("line", PLAIN)
def test_plain_lines_are_read_quickly(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_same(line.split(), monkeypatch)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(commands.HOMES)), rest=st.lists(st.sampled_from(WORDS), max_size=4))
def test_whatever_is_read_quickly_is_read_the_same_by_typer(
    name: str, rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [name, *rest]
    if isinstance(commands.found(name), Group):
        words = [name, "install" if name == "engine" else "stream", *rest]
    assert_same(words, monkeypatch)


@pytest.mark.parametrize("words", [[], ["--help"], ["list", "--help"], ["nonsense"], ["--version", "list"], ["swap"]])
def test_what_is_not_plain_is_for_typer(words: list[str]) -> None:
    assert quick.read(words) is None


HEAVY = {
    *("typer", "click", "rich", "pydantic", "asyncio", "dbus_next", "httpx", "ssl", "email", "subprocess"),
    *("numpy", "huggingface_hub", "tempfile", "importlib.metadata"),
}
LIST_IMPORTS = {"flashd.cli.models", "flashd.cli.output", "flashd.client.client", "flashd.dbus.blocking"}


@pytest.mark.parametrize(
    ("line", "needed", "most"),
    [
        ("--version", {"flashd", "flashd._version", "flashd.cli"}, 3),
        ("--bus unix:path=/nowhere list", LIST_IMPORTS, 30),
    ],
)
def test_a_quick_command_imports_little(line: str, needed: set[str], most: int) -> None:
    """Without timing: what is imported is what takes the time."""
    code = (
        "import json, sys; before = set(sys.modules)\n"
        f"sys.argv = ['flash', *{line.split()}]\n"
        "from flashd.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert not imported & HEAVY
    ours = {name for name in imported if name.split(".")[0] == "flashd"}
    assert needed <= ours and len(ours) <= most
    others = {name for name in ours if name.startswith("flashd.cli.")} - {"flashd.cli.models"}
    assert not others & {f"flashd.cli.{home.module}" for home in commands.HOMES.values()}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("modle", "did you mean model?"),
        ("Notes", "did you mean notes?"),
        ("modle/inner", "did you mean model/inner?"),
        ("model/iner", "did you mean model/inner?"),
        ("modle/other", ""),
        ("zzz", ""),
        ("n" * 300, ""),
    ],
)
def test_a_path_with_a_slip_is_answered_with_the_nearest(tmp_path: Path, asked: str, meant: str) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    done = subprocess.run(
        [Path(sys.executable).with_name("flash"), "import", asked],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "500"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"{asked} does not exist" in done.stderr
    assert meant in done.stderr and ("did you mean" in done.stderr) == bool(meant)
