# SPDX-License-Identifier: Apache-2.0
"""`flash pull` against a real daemon and a server that behaves like the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import hub as fake
import pytest
from conftest import Daemon, Remote, import_model, make_source
from dbus_next import Variant
from hub import Fault, Hub
from safetensors.numpy import load_file, save_file
from waiting import PATIENCE_S, eventually, until

from flashd import errors
from flashd.dbus import wire
from flashd.units import MiB

FLASH = Path(sys.executable).with_name("flash")
NAME = "Qwen/Qwen3-14B"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake.serving() as running:
        yield running


class Puller:
    """`flash` as one user runs it, with that user's caches."""

    def __init__(self, daemon: Daemon, hub: Hub, home: Path) -> None:
        self.home = home
        self.begun: list[subprocess.Popen[Any]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "FLASHD_BUS_ADDRESS": daemon.address,
            **hub.environment(home),
        }

    def begin(self, *arguments: str, largest_file_bytes: int = 0, **environment: str) -> subprocess.Popen[str]:
        """`largest_file_bytes` makes a disk full, as far as writes can tell (setrlimit(2))."""
        limit = ["prlimit", f"--fsize={largest_file_bytes}"] if largest_file_bytes else []
        process = subprocess.Popen(
            [*limit, FLASH, *arguments], env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.begun.append(process)
        return process

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.begin(*arguments, **options)
        output, words = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in words, words
        return subprocess.CompletedProcess(arguments, process.returncode, output, words)

    def partial_sizes(self) -> list[int]:
        return [path.stat().st_size for path in self.home.glob("cache/flashd/hub/*/*/*.part")]


@pytest.fixture
def flash(daemon: Daemon, hub: Hub, tmp_path: Path) -> Iterator[Puller]:
    puller = Puller(daemon, hub, tmp_path / "home")
    yield puller
    for process in puller.begun:
        if process.poll() is None:  # a test that failed
            process.kill()
            process.communicate()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> dict[str, bytes]:
    """A model of four shards on the hub, with what else lies about in such repositories."""
    files = files_of(make_source(tmp_path / "source", shards=4, elements=3 * MiB // 4))
    files |= {"generation_config.json": b"{}", "tokenizer.json": b'{"version": "1.0"}', "README.md": b"# a model"}
    noise = {"pytorch_model.bin": b"x" * 20_000, "model.gguf": b"x" * 20_000, "onnx/model.onnx": b"x" * 20_000}
    hub.repository(NAME).commit({**files, **noise})
    return files


def stored_files(daemon: Daemon) -> Path:
    (folder,) = (daemon.state / "store" / "checkpoints").iterdir()
    return folder


def show(flash: Puller, name: str) -> dict[str, Any]:
    shown = flash("show", name, "--json")
    assert shown.returncode == 0, shown.stderr
    return dict(json.loads(shown.stdout))


def assert_nothing_is_left(daemon: Daemon) -> None:
    until(lambda: not list((daemon.state / "store" / "partial").iterdir()))
    assert not list((daemon.state / "store" / "checkpoints").iterdir())


def weights_bytes(files: dict[str, bytes]) -> int:
    return sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))


def test_pull(flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes], tmp_path: Path) -> None:
    done = flash("pull", NAME)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is {NAME}@" in done.stderr
    shown = show(flash, "qwen3-14b")  # the short name does, if it is the only one
    commit = hub.repositories[NAME].revisions["main"]
    assert shown["name"] == NAME and shown["source"] == f"{NAME}@{commit}"
    stored = load_file(stored_files(daemon) / "model.safetensors")
    for shard in range(1, 5):
        name = f"layer.{shard}.weight"
        expected = load_file(tmp_path / "source" / f"model-0000{shard}-of-00004.safetensors")[name]
        assert (stored[name] == expected).all()
    assert flash("verify", NAME).returncode == 0
    needed = {name for name in published if name != "README.md"}
    assert {name for name, count in hub.served_bytes.items() if count} == needed
    assert {name: hub.served_bytes[name] for name in needed} == {name: len(published[name]) for name in needed}
    assert not list(flash.home.glob("cache/flashd/hub/*/*/*")), "what was downloaded is still there"


@pytest.fixture
def quantised(hub: Hub) -> dict[str, bytes]:
    """A repository with one model in several quantisations, one of them in parts."""
    tiny = gguf_files.llama(1, matrices=gguf_files.Q8_0)
    files = {f"Tiny-{kind}.gguf": gguf_files.llama(seed).packed() for seed, kind in enumerate(("Q4_K_M", "IQ4_K_M"), 2)}
    files |= {f"Tiny-Q8_0-{number:05}-of-00002.gguf": part.packed() for number, part in enumerate(tiny.parts(2), 1)}
    files |= {"mmproj-F16.gguf": b"GGUF", "config.json": b"{}", "README.md": b"# quantised"}
    hub.repository("owner/tiny-GGUF").commit(files)
    return files


def test_one_of_several_gguf_models_is_pulled(flash: Puller, hub: Hub, quantised: dict[str, bytes]) -> None:
    assert flash("pull", "owner/tiny-GGUF").returncode == 0
    assert {name for name, count in hub.served_bytes.items() if count} == {"Tiny-Q4_K_M.gguf"}, "the usual one"
    pulled = flash("pull", "owner/tiny-GGUF:q8_0")
    assert pulled.returncode == 0, pulled.stderr
    shown = show(flash, "owner/tiny-GGUF:q8_0")
    assert (shown["dtype"], shown["format"]) == ("Q8_0", "gguf")
    assert shown["source"].startswith("owner/tiny-GGUF:q8_0@")
    again = flash("pull", "owner/tiny-GGUF:q8_0")
    assert again.returncode == 0 and "already" in again.stderr
    assert hub.served_bytes["Tiny-IQ4_K_M.gguf"] == hub.served_bytes["mmproj-F16.gguf"] == 0
    missing = flash("pull", "owner/tiny-GGUF:Q2_K")
    assert missing.returncode != 0
    assert "has no variant 'Q2_K'" in missing.stderr and "IQ4_K_M, Q4_K_M, Q8_0" in missing.stderr


def test_it_is_the_same_checkpoint_as_one_that_was_imported(
    flash: Puller, daemon: Daemon, published: dict[str, bytes], tmp_path: Path
) -> None:
    assert flash("pull", NAME).returncode == 0
    (tmp_path / "source" / "generation_config.json").write_bytes(published["generation_config.json"])
    (tmp_path / "source" / "tokenizer.json").write_bytes(published["tokenizer.json"])
    assert flash("import", str(tmp_path / "source"), "imported").returncode == 0
    assert show(flash, "imported")["checkpoint"] == show(flash, NAME)["checkpoint"]


def test_a_tensor_that_was_saved_twice_is_found_although_the_shards_come_late(
    flash: Puller, hub: Hub, tmp_path: Path
) -> None:
    folder = make_source(tmp_path / "tied", shards=2, elements=MiB // 2)
    tensor = load_file(folder / "model-00001-of-00002.safetensors")["layer.1.weight"]
    save_file({"layer.2.weight": tensor}, folder / "model-00002-of-00002.safetensors")
    hub.repository("me/tied").commit(files_of(folder))
    assert flash("pull", "me/tied").returncode == 0
    assert flash("import", str(folder), "imported").returncode == 0
    assert show(flash, "imported")["checkpoint"] == show(flash, "me/tied")["checkpoint"]
    assert show(flash, "imported")["tensor_count"] == 1


def has_first_block(daemon: Daemon) -> bool:
    """Whether the checkpoint that is being made has the end of its first 8 MiB: weights, none of which is zero."""
    for path in (daemon.state / "store" / "partial").glob("*/model.safetensors"):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_bytes + 8 * MiB - 100)
            return header_bytes > 0 and any(file.read(100))
    return False


def test_what_has_arrived_is_converted_while_the_rest_is_on_its_way(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    last = "model-00004-of-00004.safetensors"
    hub.holds[last] = threading.Event()
    pull = flash.begin("pull", NAME, "--json")
    until(lambda: len(list(flash.home.glob("cache/flashd/hub/*/*/*.safetensors"))) == 3)
    until(lambda: has_first_block(daemon))
    time.sleep(1)  # until it has counted that, too
    hub.holds[last].set()
    output, words = pull.communicate(timeout=PATIENCE_S)
    assert pull.returncode == 0, words
    assert json.loads(output)["converted_early_bytes"] == 8 * MiB  # the one block that needs no byte of the last shard
    assert flash("verify", NAME).returncode == 0


def test_shards_arrive_side_by_side(flash: Puller, hub: Hub, published: dict[str, bytes]) -> None:
    shards = [name for name in published if name.endswith(".safetensors")]
    released = threading.Event()
    hub.holds = dict.fromkeys(shards, released)
    pull = flash.begin("pull", NAME)
    until(lambda: hub.answering == len(shards) == 4)  # the hub keeps each waiting for the others
    released.set()
    _, words = pull.communicate(timeout=PATIENCE_S)
    assert pull.returncode == 0, words


def test_the_same_commit_is_not_pulled_twice_and_a_moved_branch_is_a_new_version(
    flash: Puller, hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    assert flash("pull", NAME).returncode == 0
    before, checkpoint = hub.total_served_bytes(), show(flash, NAME)["checkpoint"]
    again = flash("pull", NAME)
    assert again.returncode == 0 and "already" in again.stderr and hub.total_served_bytes() == before
    old = hub.repositories[NAME].revisions["main"]
    new = hub.repository(NAME).commit(files_of(make_source(tmp_path / "newer", seed=7)))
    assert flash("pull", NAME).returncode == 0
    assert show(flash, NAME)["source"] == f"{NAME}@{new}" and show(flash, NAME)["checkpoint"] != checkpoint
    assert flash("pull", NAME, "--revision", old, "--name", "the/old one").returncode == 0
    assert show(flash, "the/old one")["checkpoint"] == checkpoint


def test_a_killed_pull_goes_on_where_it_stopped(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes], tmp_path: Path
) -> None:
    files = files_of(make_source(tmp_path / "big", shards=3, elements=6 * MiB))
    hub.repository("me/big").commit(files)
    last = "model-00003-of-00003.safetensors"
    hub.bytes_per_s = 30e6
    hub.holds[last] = threading.Event()
    pull = flash.begin("pull", "me/big")
    until(lambda: sum(flash.partial_sizes()) > 20 * MiB)
    pull.kill()
    pull.communicate()
    until(lambda: not list((daemon.state / "store" / "partial").iterdir()))
    (job,) = json.loads(flash("jobs", "--json").stdout)
    assert job["state"] == "cancelled" and "left" in job["error_message"]
    hub.holds.pop(last).set()
    hub.bytes_per_s = 0
    here = sum(path.stat().st_size for path in flash.home.glob("cache/flashd/hub/*/*/*"))
    assert here > 20 * MiB
    until(lambda: not hub.is_busy)  # with data that is no longer read
    before = hub.total_served_bytes()
    done = flash("pull", "me/big")
    assert done.returncode == 0, done.stderr
    assert hub.total_served_bytes() - before == sum(map(len, files.values())) - here
    assert flash("verify", "me/big").returncode == 0


@pytest.mark.parametrize(
    "faults",
    [
        {"api": [Fault(429, {"Retry-After": "1"}), Fault(503)]},
        {"config.json": [Fault(500), Fault(429, {"Retry-After": "1"})]},
        {"model-00002-of-00004.safetensors": [Fault(cut_after=100), Fault(cut_after=1_000_000), Fault(502)]},
        {
            "model-00002-of-00004.safetensors": [
                Fault(ignores_range=True),
                Fault(cut_after=9),
                Fault(ignores_range=True),
            ]
        },
        {"resolve/model-00003-of-00004.safetensors": [Fault(), Fault(504), Fault(429)]},
    ],
    ids=lambda faults: " ".join(faults) if isinstance(faults, dict) else None,
)
def test_what_passes_is_waited_for(
    faults: dict[str, list[Fault]], flash: Puller, hub: Hub, published: dict[str, bytes]
) -> None:
    hub.faults |= faults
    done = flash("pull", NAME)
    assert done.returncode == 0, done.stderr
    assert not any(hub.faults.values()), "the fault did not happen"
    assert flash("verify", NAME).returncode == 0


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Fault(corrupt=True), errors.TransferFailed, "does not match its digest"),
        (Fault(403), errors.NotAuthorized, "does not permit you to read"),
        (Fault(404), errors.Unavailable, "answered 404"),
        (Fault(302, {"Location": "http://127.0.0.1:1/gone"}), errors.Unavailable, "cannot be reached"),
    ],
    ids=lambda value: None,
)
def test_what_does_not_pass_ends_the_pull_with_a_remedy_and_leaves_nothing(
    fault: Fault, error: type[errors.FlashdError], words: str,
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes],
) -> None:  # fmt: skip
    hub.faults["model-00002-of-00004.safetensors"] = [Fault(), *[fault] * 20]
    done = flash("pull", NAME)
    assert done.returncode == error.exit_status, done.stderr
    assert words in done.stderr
    (job,) = json.loads(flash("jobs", "--json").stdout)
    assert job["state"] == "failed" and words in job["error_message"], job
    assert_nothing_is_left(daemon)
    hub.faults.clear()
    assert flash("pull", NAME).returncode == 0
    assert flash("verify", NAME).returncode == 0


def test_a_private_repository_needs_a_token_that_nobody_else_sees(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    hub.repository(NAME).token = "hf_secretsecret"
    refused = flash("pull", NAME)
    assert refused.returncode == errors.NotFound.exit_status
    assert "hf auth login" in refused.stderr
    wrong = flash("pull", NAME, HF_TOKEN="expired")
    assert wrong.returncode == errors.NotAuthorized.exit_status and "does not accept your token" in wrong.stderr
    login = flash.home / "huggingface" / "token"
    login.parent.mkdir(parents=True, exist_ok=True)
    login.write_text("hf_secretsecret")
    assert flash("pull", NAME).returncode == 0  # also checks that the CDN is given none
    assert "secretsecret" not in flash("jobs", "--json").stdout + show(flash, NAME)["source"]
    assert "secretsecret" not in daemon.log.read_text()
    held = [path for path in daemon.state.rglob("*") if path.is_file() and b"secretsecret" in path.read_bytes()]
    assert not held


def test_a_program_from_flashtensors_hands_over_its_token(flash: Puller, hub: Hub, published: dict[str, bytes]) -> None:
    hub.repository(NAME).token = "hf_secretsecret"
    code = f"import flashtensors as ft; print(ft.register_model({NAME!r}, backend='vllm', hf_token='hf_secretsecret'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=flash.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "'status': 'success'" in done.stdout and "secretsecret" not in done.stdout + done.stderr
    assert show(flash, NAME)["source"].startswith(f"{NAME}@")


def test_a_gated_repository_says_what_to_do(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    hub.repository(NAME).token, hub.repository(NAME).gated = "hf_accepted", True
    refused = flash("pull", NAME)
    assert refused.returncode == errors.NotAuthorized.exit_status
    assert "gated" in refused.stderr and f"{hub.url}/{NAME}" in refused.stderr and "hf auth login" in refused.stderr
    assert_nothing_is_left(daemon)
    assert flash("pull", NAME, HF_TOKEN="hf_accepted").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("pull", "no/body"), errors.NotFound, "shows you no model 'no/body'"),
        (("pull", NAME, "--revision", "v9"), errors.NotFound, "has no revision 'v9'"),
        (("pull", "../../etc"), errors.InvalidArgument, "use OWNER/NAME"),
        (("pull", NAME, "--name", "../x"), errors.InvalidArgument, "is not a name"),
        (("run", "no/body", "hello"), errors.NotFound, "flash pull no/body"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_are_answered_with_a_remedy(
    arguments: tuple[str, ...], error: type[errors.FlashdError], words: str,
    flash: Puller, published: dict[str, bytes],
) -> None:  # fmt: skip
    done = flash(*arguments)
    assert done.returncode == error.exit_status, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_person_who_swaps_to_what_is_not_here_is_offered_to_pull_it(
    answer: str, flash: Puller, published: dict[str, bytes]
) -> None:
    ours, theirs = pty.openpty()
    try:
        swap = subprocess.Popen(
            [FLASH, "swap", NAME], stdin=theirs, stdout=theirs, stderr=theirs, env=flash.environment
        )
        flash.begun.append(swap)
        os.write(ours, f"{answer}\n".encode())
        shown = b""
        while swap.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Download it from the Hugging Face Hub?" in shown
    # Nothing can run this model; what counts is that it was got, and tried.
    assert swap.returncode == (errors.EngineFailed.exit_status if answer == "y" else 1), shown
    assert (flash("show", NAME).returncode == 0) == (answer == "y")


def test_what_the_hub_says_is_not_believed(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    repository = hub.repository(NAME)
    described = {"size": 3, "blobId": "0" * 40}
    names = ("../../x", "/etc/x", "..", "a/../../b.safetensors", "config.json/../x.model", "tokenizer\n.model")
    repository.siblings = [{"rfilename": name, **described} for name in names]
    assert flash("pull", NAME).returncode == 0
    assert not list(flash.home.rglob("x"))
    repository.siblings = [{"rfilename": f"{number}.txt", **described} for number in range(20_000)]
    many = flash("pull", NAME, "--name", "b")
    assert many.returncode == errors.InvalidSource.exit_status and "more than 10000 files" in many.stderr
    repository.siblings = [{"rfilename": "chat_template.jinja", "size": 1 << 60, "blobId": "0" * 40}]
    large = flash("pull", NAME, "--name", "b")
    assert large.returncode == errors.InvalidSource.exit_status, large.stderr
    repository.siblings = []
    hub.faults["api"] = [Fault(headers={"X-Large": "x" * 1_000_000})] * 9
    assert flash("pull", NAME, "--name", "b").returncode == errors.Unavailable.exit_status


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00004.safetensors"])
@pytest.mark.parametrize("change", ["other bytes", "shorter"])
def test_a_commit_that_changes_meanwhile_is_not_taken(
    change: str, file: str, flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    repository = hub.repository(NAME)
    files = repository.files[repository.revisions["main"]]
    described = [fake.sibling(name, content) for name, content in files.items()]
    files[file] = {"other bytes": files[file][:-1] + b"!", "shorter": files[file][:-2]}[change]
    repository.described = described
    done = flash("pull", NAME)
    assert done.returncode == errors.TransferFailed.exit_status, done.stderr
    assert_nothing_is_left(daemon)


def test_a_store_without_room_says_so_before_the_weights_are_downloaded(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    assert daemon.stop() == 0
    daemon.config.write_text(daemon.config.read_text() + '[store]\nquota = "5MiB"\n')
    daemon.start()
    hub.bytes_per_s = 3e6
    done = flash("pull", NAME)
    assert done.returncode == errors.StoreFull.exit_status, done.stderr
    assert "flash rm" in done.stderr
    assert hub.total_served_bytes() < weights_bytes(published) * 0.8
    assert_nothing_is_left(daemon)


def test_a_disk_without_room_for_the_download_says_so_before_it_begins(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    described = [fake.sibling(name, content) for name, content in published.items()]
    for file in described:
        if file["rfilename"].endswith(".safetensors"):
            file["size"] = 1 << 42
    hub.repository(NAME).described = described
    done = flash("pull", NAME)
    assert done.returncode == errors.StoreFull.exit_status and "XDG_CACHE_HOME" in done.stderr, done.stderr
    assert not [name for name in hub.served_bytes if name.endswith(".safetensors")]
    assert_nothing_is_left(daemon)


def test_a_disk_that_fills_up_meanwhile_keeps_what_has_arrived(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    hub.repository(NAME).commit({**published, "tokenizer.json": b'{"x": "' + b"x" * (20 * MiB) + b'"}'})
    done = flash("pull", NAME, largest_file_bytes=15 * MiB)
    assert done.returncode == errors.StoreFull.exit_status, done.stderr
    assert_nothing_is_left(daemon)
    assert 15 * MiB in flash.partial_sizes(), "beside what else was on its way"
    assert flash("pull", NAME).returncode == 0


@pytest.mark.parametrize("how", ["cancel", "interrupt"])
def test_a_pull_can_be_cancelled(
    how: str, flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    hub.holds["model-00004-of-00004.safetensors"] = threading.Event()
    pull = flash.begin("pull", NAME)
    until(lambda: len(list(flash.home.glob("cache/flashd/hub/*/*/*.safetensors"))) == 3)

    def job() -> dict[str, Any]:
        (found,) = json.loads(flash("jobs", "--json").stdout)
        return dict(found)

    until(lambda: job()["done_bytes"] > 9 * MiB)  # progress is reported a few times a second
    assert (job()["kind"], job()["subject"], job()["phase"]) == ("pull", NAME, "downloading")
    assert job()["done_bytes"] < job()["total_bytes"]
    number = job()["number"]
    second = flash("pull", NAME)
    assert second.returncode == errors.Busy.exit_status and "is already being pulled" in second.stderr
    if how == "cancel":
        assert flash("cancel", str(number)).returncode == 0
    else:
        pull.send_signal(signal.SIGINT)
    _, words = pull.communicate(timeout=PATIENCE_S)
    assert pull.returncode == errors.Cancelled.exit_status, words
    assert "Traceback" not in words
    until(lambda: json.loads(flash("jobs", "--json").stdout)[0]["state"] == "cancelled")
    assert json.loads(flash("jobs", "--json").stdout)[1]["state"] == "failed"
    assert_nothing_is_left(daemon)
    hub.holds.popitem()[1].set()
    assert flash("pull", NAME).returncode == 0


def test_a_daemon_that_dies_costs_nothing_that_was_downloaded(
    flash: Puller, hub: Hub, daemon: Daemon, published: dict[str, bytes]
) -> None:
    hub.holds["model-00004-of-00004.safetensors"] = threading.Event()
    pull = flash.begin("pull", NAME)
    until(lambda: len(list(flash.home.glob("cache/flashd/hub/*/*/*.safetensors"))) == 3)
    daemon.stop(signal.SIGKILL)
    _, words = pull.communicate(timeout=PATIENCE_S)
    assert pull.returncode == errors.Unavailable.exit_status and "Traceback" not in words, words
    hub.holds.popitem()[1].set()
    daemon.start()
    before = dict(hub.served_bytes)
    assert flash("pull", NAME).returncode == 0
    assert {name for name, count in hub.served_bytes.items() if count > before[name]} <= {
        "model-00004-of-00004.safetensors"
    }


@pytest.mark.parametrize("offline", [False, True])
def test_an_existing_cache_is_used(
    offline: bool, flash: Puller, hub: Hub, published: dict[str, bytes], tmp_path: Path
) -> None:
    code = f"""
import huggingface_hub
for name in {sorted(published)}:
    huggingface_hub.hf_hub_download({NAME!r}, name)
"""
    subprocess.run([sys.executable, "-c", code], env=flash.environment, check=True, timeout=60, capture_output=True)
    before = hub.total_served_bytes()
    cached = sorted((flash.home / "huggingface" / "hub").rglob("*"))
    done = flash("pull", NAME, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert done.returncode == 0, done.stderr
    assert hub.total_served_bytes() == before
    assert show(flash, NAME)["source"] == f"{NAME}@{hub.repositories[NAME].revisions['main']}"
    assert sorted((flash.home / "huggingface" / "hub").rglob("*")) == cached, "the cache is not ours to change"
    if offline:
        other = flash("pull", "me/other", HF_HUB_OFFLINE="1")
        assert other.returncode == errors.Unavailable.exit_status and "HF_HUB_OFFLINE" in other.stderr


@pytest.fixture
def environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the daemon, and so of what it starts."""
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)


async def test_any_program_may_ask_for_a_pull(
    environment: None, remote: Remote, hub: Hub, published: dict[str, bytes]
) -> None:
    (job,) = await remote.call("Pull", "sa{sv}", NAME, {})
    ended = await remote.finished(job)
    assert (ended["Kind"], ended["State"], ended["Subject"]) == ("pull", "done", NAME), ended
    model = await remote.model(NAME)
    assert model["Source"] == f"{NAME}@{hub.repositories[NAME].revisions['main']}"
    before = hub.total_served_bytes()
    (job,) = await remote.call("Pull", "sa{sv}", NAME, {"revision": Variant("s", "main")})
    assert (await remote.finished(job))["State"] == "done" and hub.total_served_bytes() == before
    (job,) = await remote.call("Pull", "sa{sv}", "no/body", {"name": Variant("s", "mine")})
    ended = await remote.finished(job)
    assert ended["State"] == "failed" and "hf auth login" in ended["Error"][2], ended


async def test_a_pull_that_a_program_asked_for_can_be_cancelled(
    environment: None, remote: Remote, hub: Hub, daemon: Daemon, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.holds["model-00004-of-00004.safetensors"] = threading.Event()
    (job,) = await remote.call("Pull", "sa{sv}", NAME, {})
    with pytest.raises(errors.NotAuthorized):
        await remote.call("PullProgress", "ott", job, 1, 2)
    await eventually(lambda: len(list(tmp_path.glob("home/cache/flashd/hub/*/*/*.safetensors"))) == 3)
    await remote.call("Cancel", path=job, interface=wire.JOB)
    assert (await remote.finished(job))["State"] == "cancelled"
    assert_nothing_is_left(daemon)


async def test_what_a_caller_says_of_its_files_is_checked(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    folder = make_source(tmp_path / "source", shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    fds = {path.name: os.open(path, os.O_RDONLY) for path in folder.iterdir()}

    async def begin() -> str:
        (job,) = await remote.call("BeginPull", "ssa{sv}", "somewhere@1", "a", {})
        return str(job)

    async def send(job: str, files: dict[str, int], awaited: list[str], more: bool = False) -> None:
        numbers = list(files.values())
        table = {name: index for index, name in enumerate(files)}
        await remote.call("PullFiles", "oa{sh}asb", job, table, awaited, more, fds=numbers)

    job = await begin()
    with pytest.raises(errors.InvalidArgument, match="has no stand-in"):
        await send(job, fds, ["no.safetensors"])
    with pytest.raises(errors.InvalidSource, match="not the name of a file"):
        await send(job, {"../x": fds[first]}, [])
    await remote.call("PullFailed", "osss", job, "org.flashd1.Error.Unavailable", "no\nnetwork\x1b[2J", "")
    ended = await remote.finished(job)
    assert ended["State"] == "failed" and ended["Error"][:2] == ["org.flashd1.Error.Unavailable", "no network\\x1b[2J"]

    reader, writer = os.pipe()
    os.close(writer)
    no_files = (
        (fds[first], "header differs"),
        (fds["config.json"], "bytes instead of"),
        (reader, "not a regular file"),
    )
    for bad, words in no_files:
        job = await begin()
        await send(job, fds, [second])
        with pytest.raises(errors.InvalidSource, match=words):
            await send(job, {second: bad}, [])
        with pytest.raises(errors.InvalidArgument, match="not awaited"):
            await send(job, {first: fds[first]}, [])
        await remote.call("Cancel", path=job, interface=wire.JOB)
        assert (await remote.finished(job))["State"] == "cancelled"
    assert_nothing_is_left(daemon)
    job = await begin()
    await send(job, fds, [second])
    await send(job, {second: fds[second]}, [])
    assert (await remote.finished(job))["State"] == "done"
    for fd in (reader, *fds.values()):
        os.close(fd)


async def test_many_pulls_at_once_keep_nobody_waiting(remote: Remote, daemon: Daemon, tmp_path: Path) -> None:
    folder = make_source(tmp_path / "source")
    fds = {path.name: os.open(path, os.O_RDONLY) for path in folder.iterdir()}
    table = {name: index for index, name in enumerate(fds)}
    jobs = []
    for number in range(40):  # more than there are threads
        (job,) = await remote.call("BeginPull", "ssa{sv}", "somewhere@1", f"late {number}", {})
        await remote.call("PullFiles", "oa{sh}asb", job, table, ["model.safetensors"], False, fds=list(fds.values()))
        jobs.append(job)
    await import_model(remote, folder, "dropped meanwhile")
    fd = fds["model.safetensors"]
    for job in reversed(jobs):  # the first ones, for which a thread waits, are the last to arrive
        await remote.call("PullFiles", "oa{sh}asb", job, {"model.safetensors": 0}, [], False, fds=[fd])
        assert (await remote.finished(job))["State"] == "done"
    for fd in fds.values():
        os.close(fd)


def test_how_embeddings_are_pooled_is_pulled_from_its_folder(
    flash: Puller, hub: Hub, daemon: Daemon, tmp_path: Path
) -> None:
    content = b'{"pooling_mode_cls_token": true}'
    files = files_of(make_source(tmp_path / "source"))
    hub.repository("owner/embeds").commit({**files, "1_Pooling/config.json": content, "2_Dense/config.json": b"{}"})
    done = flash("pull", "owner/embeds")
    assert done.returncode == 0, done.stderr
    assert (stored_files(daemon) / "1_Pooling.json").read_bytes() == content
