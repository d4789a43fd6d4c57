# SPDX-License-Identifier: Apache-2.0
"""Builds llama.cpp's llama-server from its sources, and packs it as a wheel, as environments of engines are made of.

The sources are those that llama-cpp-python publishes on the package index, of one release with a known digest: a build
runs their code with the rights of the user, unlike the installation of a wheel. No prebuilt wheel contains the server.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from flashd.cli.wheels import Supply, pip_download
from flashd.errors import InvalidSource, TransferFailed, Unavailable

PROJECT, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROGRAM = "llama-server"
_SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
_INSIDE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
_TOOLS = {"cmake": "cmake", "c++": "g++"}  # programs, and the packages that have them
# Neither its web page, nor transfers by itself, nor other programs; and one file, without libraries of its own.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "GGML_CCACHE": "OFF", "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF", "LLAMA_SUBPROCESS": "OFF", "LLAMA_ALL_WARNINGS": "OFF", "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": VERSION,
}  # fmt: skip


def wheel(folder: Path, supply: Supply) -> Path:
    """Downloads and builds in an empty folder, and returns the wheel. Shows cmake's progress.

    Raises Unavailable if tools are missing, TransferFailed, or InvalidSource for other sources than the known ones.
    """
    _check_tools()
    return pack(build(fetch(folder, supply), folder), folder)


def fetch(folder: Path, supply: Supply) -> Path:
    """Returns the archive of the sources, downloaded by pip unless the supply is a folder, and checks its digest."""
    if supply.folder is not None:
        archive = supply.folder / _SDIST
        if not archive.is_file():
            hint = f"on a machine with a network: pip download --no-deps --no-binary :all: {PROJECT}=={VERSION}"
            raise TransferFailed(f"{supply.folder} lacks {_SDIST}", hint=hint)
    else:
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{PROJECT}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        pip_download(["--no-binary", PROJECT, "--no-deps", "--require-hashes", "-r", str(wanted)], folder, supply)
        archive = folder / _SDIST
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise InvalidSource(f"{archive} is not the release that is known", hint="download it again")
    return archive


def build(archive: Path, folder: Path, options: Sequence[str] = ()) -> Path:
    """Builds the server from the archive, with further options for cmake. Returns the path of the program."""
    with tarfile.open(archive) as sources:
        if hasattr(tarfile, "data_filter"):  # Debian 12's Python lacks it; the digest has vouched for the archive
            sources.extraction_filter = tarfile.data_filter
        sources.extractall(folder, [member for member in sources if member.name.startswith(f"{_INSIDE}/")])
    made = folder / "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    chosen = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _run(["cmake", "-S", str(folder / _INSIDE), "-B", str(made), *generator, *chosen, *options])
    _run(["cmake", "--build", str(made), "--target", PROGRAM, "--parallel"])
    return made / "bin" / PROGRAM


def pack(program: Path, folder: Path) -> Path:
    """Packs the program as a wheel for this machine (PEP 427), and returns its path."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    name, tag = f"llama_server-{VERSION}", f"py3-none-{platform}"
    files = {
        f"{name}.data/scripts/{PROGRAM}": program.read_bytes(),
        f"{name}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: llama-server\nVersion: {VERSION}\n".encode(),
        f"{name}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    record = "".join(f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items())
    files[f"{name}.dist-info/RECORD"] = f"{record}{name}.dist-info/RECORD,,\n".encode()
    made = folder / f"{name}-{tag}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if path.endswith(PROGRAM) else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return made


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _check_tools() -> None:
    if missing := [package for program, package in _TOOLS.items() if shutil.which(program) is None]:
        hint = f"on Debian and Ubuntu: apt install {' '.join(missing)}; or set engines.llama.server to a llama-server"
        raise Unavailable(f"llama.cpp is built from its sources, but there is no {' and no '.join(missing)}", hint=hint)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise TransferFailed(f"llama.cpp cannot be built: {command[0]} failed", hint="see its messages above")
