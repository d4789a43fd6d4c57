# SPDX-License-Identifier: Apache-2.0
"""`flash convert`: converts a source to a checkpoint folder, without a daemon."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

from flashd.checkpoint.convert import convert as convert_source
from flashd.checkpoint.files import Checkpoint
from flashd.checkpoint.source.reader import SourceFiles
from flashd.cli import near_paths, output
from flashd.cli.parameters import Argument, Option
from flashd.errors import AlreadyExists, InvalidArgument
from flashd.units import format_bytes, format_seconds


def convert(
    source: Annotated[Path, Argument(exists=True, help="A folder, or one file of weights.")],
    destination: Annotated[Path, Argument(help="The folder to create.")],
    python: Annotated[str, Option(help="An interpreter with torch, for PyTorch files.")] = sys.executable,
    base: Annotated[
        Path | None, Option(help="Converted folder of the base model, to merge a LoRA adapter into.")
    ] = None,
) -> None:
    """Converts a source to a checkpoint folder, without a daemon. Other tools can open the result."""
    if near_paths.exists(destination):
        raise AlreadyExists(f"{destination} exists", hint="name a folder that does not exist")
    if not os.path.isdir(destination.parent):  # noqa: PTH112 -- False also for a name that is too long for a folder
        raise InvalidArgument(f"{destination.parent} is not a folder", hint="create it first")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
    except OSError as error:
        raise InvalidArgument(
            f"cannot create {destination}: {error.strerror}", hint="name a folder that you can create"
        ) from None
    started = time.monotonic()
    try:
        with (
            SourceFiles.from_path(source.resolve()) as files,
            output.own_progress(f"converting {source.name}") as show,
        ):
            found = Checkpoint.open(base) if base else None
            manifest = convert_source(files, partial, python=python, base=found, note=str(source), on_progress=show)
        partial.rename(destination)
    finally:
        if partial.exists():
            for leftover in partial.iterdir():
                leftover.unlink()
            partial.rmdir()
    took = format_seconds(time.monotonic() - started)
    output.say(f"{destination}: {format_bytes(manifest.data_bytes)} in {manifest.tensor_count} tensors, {took}")
