# SPDX-License-Identifier: Apache-2.0
"""The container recipe, built and run with buildah; its base image is made from a root folder, without a registry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

RECIPE = ROOT / "packaging" / "container" / "Containerfile"
SOURCE = """
import json, struct, pathlib
made = pathlib.Path("/tmp/one"); made.mkdir()
header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
(made / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4000))
(made / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "model_type": "tiny"}))
"""


@dataclass(frozen=True, slots=True)
class Images:
    """A store of images of its own; nothing of it is left afterwards."""

    folder: Path

    def buildah(self, *arguments: str | Path, stdin: int | None = None) -> str:
        command = ["buildah", "--root", self.folder, "--runroot", self.folder / "run", "--storage-driver", "overlay"]
        done = subprocess.run([*command, *arguments], stdin=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def run(self, container: str, *command: str) -> str:
        return self.buildah("run", "--isolation", "chroot", container, "--", *command)


@pytest.fixture(scope="module")
def images(tools: None) -> Iterator[Images]:
    if shutil.which("buildah") is None:
        pytest.skip("needs buildah: tests/system/run installs it")
    folder = Path("/var/cache/flashd-tests") / f"images-{os.getpid()}"  # large, and not for an overlay
    folder.mkdir(parents=True)
    yield Images(folder)
    # Its mounts have ended with its processes; a file system below would not be ours to remove.
    subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


@pytest.fixture(scope="module")
def container(images: Images, base: Path, package: Path) -> str:
    """One made from the image of the recipe."""
    scratch = images.buildah("from", "scratch")
    with subprocess.Popen(["tar", "-C", base, "-c", "."], stdout=subprocess.PIPE) as packed:
        assert packed.stdout is not None
        archive = images.folder / "base.tar"
        with archive.open("wb") as file:
            shutil.copyfileobj(packed.stdout, file)
    images.buildah("add", scratch, archive, "/")
    archive.unlink()
    images.buildah("commit", "--rm", scratch, "localhost/base")
    options = ("--isolation", "chroot", "--build-arg", "BASE=localhost/base", "--pull-never", "--format", "docker")
    images.buildah("build", *options, "--file", RECIPE, "--tag", "localhost/flashd", package.parent)
    return images.buildah("from", "--pull-never", "localhost/flashd")


def test_the_image_says_how_it_is_run(images: Images, container: str) -> None:
    told = json.loads(images.buildah("inspect", "--type", "image", "localhost/flashd"))["Docker"]["config"]
    assert told["User"] == "flashd"
    assert set(told["Volumes"]) == {"/var/lib/flashd", "/models"}
    assert told["Healthcheck"]["Test"] == ["CMD", "/usr/bin/flash", "status"]


def test_a_container_of_it_serves_its_user(images: Images, container: str) -> None:
    told = json.loads(images.buildah("inspect", "--type", "image", "localhost/flashd"))["Docker"]["config"]
    inside = (
        f"{' '.join(told['Entrypoint'])} 2>/tmp/log & daemon=$!; trap 'cat /tmp/log >&2' EXIT; "
        "for _ in $(seq 100); do flash status >/dev/null 2>&1 && break; sleep 0.2; done; "
        f"/usr/lib/flashd/bin/python3 -c '{SOURCE}'; cp -r /tmp/one /models/dropped; "
        "for _ in $(seq 100); do flash load dropped 2>/dev/null && break; sleep 0.2; done; "
        "id -un; flash list --json; kill $daemon; wait $daemon"
    )
    user, _, listed = images.run(container, "sh", "-euc", inside).partition("\n")
    assert user == "flashd"
    assert [(m["name"], m["residency"]) for m in json.loads(listed) if "residency" in m] == [("dropped", "host")]
