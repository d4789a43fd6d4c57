# SPDX-License-Identifier: Apache-2.0
"""Small models for tests, made once for each version of their recipe, of torch and of transformers (kept.py).

ada and bob are those of the quick start, and say who they are; carl has another architecture, and learned nothing.
Tests get copies, which they may change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import kept

_TOUR = Path(__file__).parents[1] / "packaging" / "tour"
_MAKE = """
import sys, pathlib, shutil, small_models, transformers
folder = pathlib.Path(sys.argv[1])
small_models.make_base(folder / "ada")
small_models.make_finetune(folder / "ada", folder / "bob")
config = transformers.Qwen3Config.from_pretrained(folder / "ada")
config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "carl")
for file in folder.glob("ada/*token*"):
    shutil.copy(file, folder / "carl")
"""


def put(folder: Path, *names: str) -> None:
    """Copies some of them into a folder."""
    made = kept.folder("models", *recipe(), make=lambda partial: run(_MAKE, partial))
    for name in names:
        shutil.copytree(made / name, folder / name)


def recipe() -> tuple[str | Path, ...]:
    """Returns everything that determines the models' contents."""
    return _TOUR / "small_models.py", _TOUR / "personas.py", _MAKE, version("torch"), version("transformers")


def run(code: str, *arguments: str | Path) -> None:
    """Runs a program that makes models. It has one thread: on a busy machine, more only wait for each other."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (_TOUR, Path(__file__).parent)))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
