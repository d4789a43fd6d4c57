# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: the layers of the README's map, walked from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flashd"

FLOOR = {"errors", "units", "wire", "config", "sandbox"}
# A part may import itself, the floor, and what is named here.
MAY_IMPORT = {
    "errors": set(),
    "units": set(),
    "wire": set(),
    "config": set(),
    "sandbox": set(),
    "streamer": {"_native"},
    "bus": set(),
    "private_bus": set(),
    "cuda": set(),
    "tensors": {"checkpoint", "cuda"},
    "inference": set(),
    "checkpoint": {"streamer"},
    "store": {"checkpoint", "streamer"},
    "memory": {"checkpoint", "streamer", "cuda"},
    "engines": {"memory", "checkpoint", "cuda", "tensors", "streamer", "client"},  # its loader in any vLLM is a client
    "supply": {"engines", "memory", "checkpoint"},
    "swap": {"supply", "engines", "memory"},
    "daemon": {"swap", "supply", "engines", "memory", "store", "checkpoint", "streamer", "bus", "private_bus", "cuda"},
    "hub": {"checkpoint"},  # works for a client, and is given one
    "client": {"bus", "checkpoint", "tensors", "inference", "hub"},
    "bench": {"streamer", "checkpoint", "memory", "client", "cuda"},
    "cli": {
        *("client", "starting", "hub", "inference", "private_bus", "checkpoint", "bench", "streamer", "memory", "cuda"),
    },
    "handover": {"client", "store"},
    "errands": {"client"},
    "starting": {"client"},
    "obtaining": {"client"},
    "state_dicts": {"client", "checkpoint", "streamer", "tensors", "cuda"},
    "compat": {"client", "inference", "starting", "obtaining", "state_dicts", "tensors"},  # never the daemon
    "__init__": {"client", "state_dicts", "compat"},
}
# The tray is a package of its own, and a client like any other: never the daemon, nor what is behind it.
TRAY = PACKAGE.parent / "tray" / "flashd_tray"
TRAY_MAY_IMPORT = {"client", "bus", "errors", "units", "wire"}
TRAY_ENVIRONMENT_READERS = {"preferences.py", "shell.py"}  # the desktop's variables: where choices lie, what panel
TORCH_IMPORTERS = {
    *("flashd.tensors", "flashd.state_dicts", "flashd.checkpoint.unpickle", "flashd.checkpoint.merge"),
    "flashd.compat.modules",
}
ENGINE_WORKERS = ("flashd.engines.torch", "flashd.engines.vllm")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("flashd", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)
        yield name, ast.parse(path.read_text(), filename=str(path))


def imports(tree: ast.AST, *, top_level_only: bool = False) -> set[str]:
    """Dotted names imported, `from a import b` counted as both a and a.b; type-checking-only imports are left out."""
    found = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return found


def part(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_stay_within_the_layers(name: str, tree: ast.Module) -> None:
    ours = {part(m) for m in imports(tree) if m.startswith("flashd.")} - {part(name), "__version__"}
    known = {p for p in ours if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").is_file() or p == "_native"}
    allowed = MAY_IMPORT[part(name)] | FLOOR
    assert known <= allowed, f"{name} imports {sorted(known - allowed)}, which its layer may not"


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_only_those_who_need_them_import_torch_and_dbus(name: str, tree: ast.Module) -> None:
    roots = {m.split(".")[0] for m in imports(tree)}
    if roots & {"torch", "transformers", "vllm"}:
        assert name.startswith(ENGINE_WORKERS) or name in TORCH_IMPORTERS
    if "dbus_next" in roots:
        assert name in {"flashd.bus", "flashd.client"} or name.startswith("flashd.daemon")
    if "_native" in {m.split(".")[1] for m in imports(tree) if m.startswith("flashd.")}:
        assert name == "flashd.streamer"


def test_no_import_cycles() -> None:
    known = {name for name, _ in modules()}
    graph = {name: (imports(tree, top_level_only=True) & known) - {name} for name, tree in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_only_the_configuration_reads_the_environment() -> None:
    for name, tree in modules():
        if name == "flashd.config":
            continue
        reads = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in {"environ", "getenv"}]
        assert not reads, f"{name} reads the environment on lines {reads}; that is config.py's"


@pytest.mark.parametrize("path", sorted(TRAY.glob("*.py")), ids=lambda path: path.name)
def test_the_tray_is_a_client(path: Path) -> None:
    tree = ast.parse(path.read_text())
    ours = {part(module) for module in imports(tree) if module.startswith("flashd.")} - {"__version__"}
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
