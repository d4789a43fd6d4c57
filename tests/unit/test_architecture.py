# SPDX-License-Identifier: Apache-2.0
"""The layers of the package: imports, as read from the source, follow the map of the architecture page."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flashd"

# The parts of the package, lowest first. Each imports only itself and parts below it.
LAYERS = [
    *("_version", "legible", "legible_log", "errors", "units", "json_values", "toml"),
    *("closing", "durable", "config", "tasks"),
    "service_manager",
    *("_native", "io", "dbus", "checkpoint", "tensors", "memory", "store"),
    *("hub", "client", "user_inbox", "gateway", "compat", "bench", "cli"),
    *("engines", "workers", "swap", "daemon"),
]
DAEMON_LAYERS = [
    *("events", "access", "lifecycle", "job", "jobs", "changing_models"),
    *("ingest", "library", "serving", "bus", "service", "main"),
]
# Three kinds of processes run this package, and none imports the code of another.
CLIENT_SIDE = {"hub", "client", "user_inbox", "gateway", "compat", "bench", "cli"}
DAEMON_SIDE = {"store", "memory", "swap", "daemon"}
NEVER_IMPORTS = {
    "engines": CLIENT_SIDE,
    "swap": CLIENT_SIDE | {"workers"},
    "daemon": CLIENT_SIDE | {"workers"},
    "gateway": {"checkpoint", "tensors", "io", "store", "memory"},
    "workers": DAEMON_SIDE | {"gateway", "compat", "bench", "cli"},  # the loader of any vLLM is a client
}
# The tray is a separate package and an ordinary client: it never imports the daemon or its parts.
TRAY = PACKAGE.parent / "tray" / "flashd_tray"
TRAY_MAY_IMPORT = {"_version", "client", "dbus", "errors", "legible", "legible_log", "units"}
TRAY_ENVIRONMENT_READERS = {"preferences.py", "shell.py"}  # the desktop's variables: where choices lie, what panel
TORCH_IMPORTERS = {
    *(
        "flashd.tensors",
        "flashd.client.state_dicts",
        "flashd.checkpoint.source.unpickle_worker",
        "flashd.checkpoint.lora.worker",
        "flashd.checkpoint.torch_dtypes",
    ),
    "flashd.compat.modules",
}
ENGINE_WORKERS = ("flashd.workers.torch", "flashd.workers.vllm")


@functools.cache
def modules() -> Sequence[tuple[str, ast.Module]]:
    """Every module's name and source, which tests only read."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("flashd", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)
        found.append((name, ast.parse(path.read_text(), filename=str(path))))
    return found


def imports(tree: ast.AST) -> set[str]:
    """Dotted names imported, `from a import b` counted as both a and a.b; type-checking-only imports are left out."""
    found = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # as flashd/compat/flashtensors does, which is installed under another name
                continue
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return found


def all_imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules imported anywhere, also by functions and for types; `from a import b` is of a.b if that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known or {node.module}
    return found & known


def part(module: str) -> str:
    return module.split(".")[1]


def entries(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_every_folder_has_its_layer() -> None:
    assert entries(PACKAGE) == {*LAYERS, "__init__"} - {"_native"}
    assert entries(PACKAGE / "daemon") == {*DAEMON_LAYERS, "__init__"}


def test_imports_go_down() -> None:
    assert [fault for name, tree in modules() for fault in imported_above(name, tree)] == []


def imported_above(name: str, tree: ast.Module) -> Iterator[str]:
    """What a module imports and may not, as sentences."""

    def below(layers: list[str], depth: int) -> Iterator[str]:
        found = [m.split(".") for m in imports(tree) if m.startswith(".".join(["flashd", "daemon"][:depth]) + ".")]
        ours = {parts[depth] for parts in found} & set(layers)
        mine = name.split(".")[depth]
        allowed = set(layers[: layers.index(mine) + 1])
        if not ours <= allowed:
            yield f"{name} imports {sorted(ours - allowed)}, which is above it"

    if part(name) != "__init__":
        yield from below(LAYERS, 1)
        ours = {part(m) for m in imports(tree) if m.startswith("flashd.")}
        if elsewhere := ours & NEVER_IMPORTS.get(part(name), set()):
            yield f"{name} imports {sorted(elsewhere)}, which runs in another process"
    if part(name) == "daemon" and name != "flashd.daemon":
        yield from below(DAEMON_LAYERS, 2)


def test_only_those_who_need_them_import_torch_and_dbus() -> None:
    for name, tree in modules():
        roots = {m.split(".")[0] for m in imports(tree)}
        if roots & {"torch", "transformers", "vllm"}:
            assert name.startswith(ENGINE_WORKERS) or name in TORCH_IMPORTERS, name
        if "dbus_next" in roots:
            assert name.startswith(("flashd.dbus.", "flashd.daemon.")), name
        if "_native" in {m.split(".")[1] for m in imports(tree) if m.startswith("flashd.")}:
            assert name == "flashd.io.streamer", name


def test_no_import_cycles() -> None:
    """Nor are there any among imports that functions make, or that only types need."""
    known = {name for name, _ in modules()}
    graph = {name: all_imports(tree, known) - {name, "flashd"} for name, tree in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_the_package_does_not_import_its_own_face() -> None:
    """flashd/__init__.py imports most of the package: what imports that in turn ties everything into one knot."""
    inside = entries(PACKAGE) | {"_native"}
    for name, node in ((name, node) for name, tree in modules() for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            assert "flashd" not in {alias.name for alias in node.names}, f"{name}: line {node.lineno} imports all"
        elif isinstance(node, ast.ImportFrom) and node.module == "flashd":
            outside = {alias.name for alias in node.names} - inside
            assert not outside, f"{name}: import {sorted(outside)} from its own module, on line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert name == "flashd.compat.flashtensors", f"{name}: a relative import on line {node.lineno}"


def test_only_the_configuration_reads_the_environment() -> None:
    for name, tree in modules():
        if name == "flashd.config.environment":
            continue
        reads = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in {"environ", "getenv"}]
        assert not reads, f"{name} reads the environment on lines {reads}; that is config/environment.py's"


@pytest.mark.parametrize("path", sorted(TRAY.glob("*.py")), ids=lambda path: path.name)
def test_the_tray_is_a_client(path: Path) -> None:
    tree = ast.parse(path.read_text())
    ours = {part(module) for module in imports(tree) if module.startswith("flashd.")}
    assert ours <= TRAY_MAY_IMPORT
    roots = {module.split(".")[0] for module in imports(tree)}
    assert "pystray" not in roots or path.name == "indicator.py"
    if path.name not in TRAY_ENVIRONMENT_READERS:
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in {"environ", "getenv"}]
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("module", ["flashd", "flashd.daemon.main", "flashd.daemon.service", "flashd.cli"])
def test_control_processes_import_no_framework(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "unwanted = {'torch', 'transformers', 'vllm', 'numpy', 'huggingface_hub'}; "
        "print(*sorted(unwanted & {m.split('.')[0] for m in sys.modules}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""


def test_every_file_is_headed_by_its_licence_and_its_question() -> None:
    for name, tree in modules():
        path = PACKAGE / "/".join(name.split(".")[1:])
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n"), name
        assert ast.get_docstring(tree), f"{name} does not say what question it answers"
