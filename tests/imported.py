# SPDX-License-Identifier: Apache-2.0
"""A Python whose zygotes and converters are forks of one process, which has imported torch or vLLM for all tests.

The imports take three or ten seconds of a processor, and most tests that need them are about something else. Such a
Python is a program for `engines.torch.python`. It passes some orders on to that process (import_forks.py), with its
environment and descriptors, and ends as the fork does. Anything else is run by the interpreter that it stands for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

TORCH = ("flashd.workers.torch.main", "flashd.checkpoint.lora.worker", "flashd.checkpoint.source.unpickle_worker")
VLLM = ("flashd.workers.vllm.main",)
TORCH_PYTHON = "FLASHD_TESTS_TORCH_PYTHON"  # names the program for `engines.torch.python` of daemons that have no own
_FORKS = Path(__file__).with_name("import_forks.py")
_PROGRAM = """\
#!{python} -IS
import json, os, resource, signal, socket, sys
arguments = sys.argv[1:]
if arguments[:1] != ["-m"] or arguments[1] not in {modules!r}:
    os.execv({python!r}, [{python!r}, *arguments])
fds = []
for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        os.fstat(fd)
        fds.append(fd)
    except OSError:
        pass  # that of the folder
umask = os.umask(0)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
program = dict(arguments=arguments, folder=os.getcwd(), environment=dict(os.environ), umask=umask,
               descriptor_limits=limits, fds=fds)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as forks:
    forks.connect({address!r})
    socket.send_fds(forks, [json.dumps(program).encode()], fds)
    for fd in fds[3:]:
        os.close(fd)
    status = int(forks.recv(16) or b"1")
if status < 0:
    os.kill(os.getpid(), -status)
    signal.pause()
sys.exit(status)
"""


def interpreter() -> str:
    """The Python for converters: this test run's program where a test has it, else ours."""
    return os.environ.get(TORCH_PYTHON) or sys.executable


@contextlib.contextmanager
def python(
    real: str = sys.executable,
    modules: tuple[str, ...] = TORCH,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Makes the program, and runs the process behind it, which imports when it is first asked.

    `real` is the interpreter that it stands for. `modules` are run in forks; the first is a zygote, whose imports serve
    all of them. `environment` is there, in addition to ours, while they are imported.
    """
    with tempfile.TemporaryDirectory(prefix="fd-") as folder:  # short, as addresses of sockets have to be
        program, address = Path(folder) / "python", f"{folder}/forks"
        program.write_text(_PROGRAM.format(python=real, modules=modules, address=address))
        program.chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen(64)
            forks = subprocess.Popen(
                [real, "-P", _FORKS, modules[0], str(listener.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(),),
            )
        with forks:  # which ends when its standard input is closed
            yield program
