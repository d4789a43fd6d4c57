# SPDX-License-Identifier: Apache-2.0
"""Distribution of the tests over several processes of pytest (pytest-xdist), as tests/run asks for it.

A module's tests stay together, and so do modules and tests that share what takes long to make. The longest begin first,
so that nothing is waited for at the end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

# Modules and tests that share zygotes and models. The first that fits counts.
_TOGETHER = {
    "tests/engines/test_vllm_engine": "vllm",
    "tests/engines/test_made_up_weights.py::test_vllm_": "vllm",
    "tests/engines/test_made_up_weights.py::test_what_vllm_": "vllm",
    "tests/engines/test_made_up_weights.py::test_a_layer_that_is_wrapped_": "vllm",
    "tests/engines/test_torch_requests.py::test_vllm_": "vllm",
    "tests/engines/test_vllm_": "daemons with vllm",
    "tests/engines/test_adapters_both_ways": "daemons with vllm",
    "tests/engines/test_llama_": "llama.cpp",
    "tests/engines/": "torch",
}
# In which order groups begin; the others follow as they were collected.
_FIRST = (
    "tests/system/test_arm64.py",  # is emulated, and takes longest
    "tests/system/test_package.py",  # builds the package that all machines have
    "vllm",
    "daemons with vllm",
    "llama.cpp",  # may have to be built first, with the lowest priority
    "tests/system/test_ubuntu.py",
    "torch",
    "tests/native/test_sanitize.py",
    "tests/system/test_desktop_rights.py",
    "tests/campaigns/",
    *("tests/bus/test_outlive.py", "tests/test_quickstart.py"),
    "tests/system/",
    *("tests/unit/test_hostile_sources.py", "tests/unit/test_adapters.py", "tests/unit/test_style.py"),
    *("tests/bus/", "tests/desktop/", "tests/native/"),
)
# The modules of tests/run --fast, and those of them that are left out because each test starts PyTorch.
_FAST = (
    *("tests/unit/", "tests/native/test_load.py", "tests/native/test_copy.py", "tests/bus/test_contract.py"),
    *("tests/bus/test_client.py", "tests/bus/test_serving_beside.py", "tests/engines/test_torch_requests.py"),
)
_PATIENCE = 4  # times a test's own limit, where others run beside it
_NOT_FAST = ("tests/unit/test_adapters.py", "tests/unit/test_convert.py", "tests/unit/test_hostile_sources.py")


def is_fast(module: str) -> bool:
    return module.startswith(_FAST) and module not in _NOT_FAST


def group(nodeid: str) -> str:
    """Returns the name of the tests that one process runs together: mostly the name of their module."""
    module = nodeid.partition("::")[0]
    return next((name for start, name in _TOGETHER.items() if nodeid.startswith(start)), module)


def rank(nodeid: str) -> int:
    """The turn of a test's group."""
    name = group(nodeid)
    return next((turn for turn, start in enumerate(_FIRST) if name.startswith(start)), len(_FIRST))


def workers(config: pytest.Config) -> int:
    """How many processes are worth their start: none for a few tests.

    Two a processor, because tests wait as much as they work.
    """
    chosen = config.option.keyword or config.option.markexpr or getattr(config.option, "lf", False)
    if chosen or not any(Path(argument).is_dir() for argument in config.args):
        return 0
    return max(2, min(2 * len(os.sched_getaffinity(0)), 8))


def be_patient(items: Sequence[pytest.Item], usual_s: float) -> None:
    """Gives each test longer: a limit is for what hangs, and twice as many processes as processors are slower."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = float(marker.args[0]) if marker and marker.args else usual_s
        item.add_marker(pytest.mark.timeout(_PATIENCE * limit_s), append=False)


def is_one_of_several(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def ordered(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    return sorted(items, key=lambda item: rank(item.nodeid))


def make_scheduling(config: pytest.Config, log: object) -> object:
    """Hands out groups in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

        def remove_node(self, node: object) -> str | None:
            """Gives what a process had left to the others, but for the test in which it died: returns its name."""
            left = [(name, tests) for name, tests in self.assigned_work.pop(node).items() if not all(tests.values())]
            if not left:
                return None
            died_in: str = next(test for test, is_done in left[0][1].items() if not is_done)
            left[0][1][died_in] = True
            self.workqueue.update((name, tests) for name, tests in left if not all(tests.values()))
            for other in self.assigned_work:
                self._reschedule(other)
            return died_in

        def _reschedule(self, node: object) -> None:
            if node in self.registered_collections:  # else it replaces another process, and is still collecting
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Groups(config, log)
