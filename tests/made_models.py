# SPDX-License-Identifier: Apache-2.0
"""Small models for tests, made once for each version of what they are made of.

ada and bob are those of the quick start, and say who they are; carl has another architecture, and learned nothing.

They are kept in ${XDG_CACHE_HOME:-~/.cache}/flashd/models, in a folder named after the digest of
packaging/tour/small_models.py and the versions of torch and transformers. Tests get copies, which are theirs to change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

_RECIPE = Path(__file__).parents[1] / "packaging" / "tour" / "small_models.py"
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
    made = _made()
    for name in names:
        shutil.copytree(made / name, folder / name)


def _made() -> Path:
    parts = (_RECIPE.read_bytes(), _MAKE.encode(), version("torch").encode(), version("transformers").encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashd" / "models"
    folder = cache / digest
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:  # of two runs, one trains, and the other waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = cache / f"{digest}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            # One thread: on a busy machine more only wait for each other.
            told = {**os.environ, "PYTHONPATH": str(_RECIPE.parent), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-c", _MAKE, partial], env=told, check=True, capture_output=True)
            partial.rename(folder)
    return folder
