# SPDX-License-Identifier: Apache-2.0
"""Engines outlive the daemon, and the next daemon finds them through the service manager's descriptor store."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import SAYS
from manager import Keeper, KeptDaemon, Manager, of_both, start
from processes import is_alive
from running import CONFIG, Daemon
from waiting import PATIENCE_S, until

import flashd
from flashd.dbus.private_bus import PrivateBus

WHO = [{"role": "user", "content": "Who are you?"}]
LONG = {"prompt": "Who are you?", "max_tokens": 200, "temperature": 5.0, "stream": True}
TOGETHER = 6  # one engine generates them one after the other


@pytest.fixture
def manager(short_path: Path, request: pytest.FixtureRequest) -> Iterator[Manager | Keeper]:
    made: Manager | Keeper
    if getattr(request, "param", "double") == "keeper":
        made = Keeper(short_path / "keeper")
    else:
        made = Manager(short_path / "manager")
        made.open()
    yield made
    made.close()


@pytest.fixture
def daemon(
    bus: PrivateBus, short_path: Path, tmp_path: Path, manager: Manager | Keeper, sources: Path
) -> Iterator[Daemon]:
    """With ada and carl, of which carl serves and ada is parked, and bob."""
    running = (
        KeptDaemon(bus.address, tmp_path, short_path, keeper=manager)
        if isinstance(manager, Keeper)
        else Daemon(bus.address, tmp_path, short_path)
    )
    running.config.write_text(CONFIG)
    start(running, manager)
    with flashd.connect(running.address) as client:
        for name in ("ada", "bob", "carl"):
            client.import_(sources / name, name)
        for name in ("ada", "carl"):
            client.swap(name)
    yield running
    assert (manager if isinstance(manager, Keeper) else running).stop() == 0
    words = running.log.read_text()
    assert "Traceback" not in words and "never retrieved" not in words, words


def engines(daemon: Daemon) -> dict[str, tuple[str, int]]:
    """State and process of each model's engine."""
    with flashd.connect(daemon.address) as client:
        return {engine.model: (engine.state, engine.pid) for engine in client.engines()}


def kept(manager: Manager | Keeper, prefix: str) -> list[str]:
    """Of the keeper nobody is told what it keeps."""
    if isinstance(manager, Keeper):
        return []
    return sorted(name for name in manager.names() if name.startswith(prefix))


def rests(client: flashd.Client) -> None:
    """Returns when whoever is active was idle for long enough, and is parked until it is asked."""
    client.set_config("engines.idle_timeout_s", "1")
    until(lambda: client.status().active_model == "" and {engine.state for engine in client.engines()} == {"parked"})
    client.set_config("engines.idle_timeout_s", "0")


def asked(endpoint: str, begun: threading.Event) -> str:
    """A long answer of whoever is active, streamed to its end."""
    transport = httpx.HTTPTransport(uds=endpoint)
    with (
        httpx.Client(transport=transport, base_url="http://flashd", timeout=PATIENCE_S) as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        assert answer.status_code == 200
        pieces = answer.iter_text()
        first = next(pieces)
        begun.set()
        return first + "".join(pieces)


def in_flight(daemon: Daemon, threads: ThreadPoolExecutor) -> list[Future[str]]:
    """Requests that an engine has all let in, and of which it is answering the first."""
    with flashd.connect(daemon.address) as client:
        endpoint = client.status().endpoint
    begun = threading.Event()
    requests = [threads.submit(asked, endpoint, begun) for _ in range(TOGETHER)]
    assert begun.wait(PATIENCE_S)
    transport = httpx.HTTPTransport(uds=endpoint)
    with httpx.Client(transport=transport, base_url="http://flashd", timeout=PATIENCE_S) as http:
        until(lambda: http.get("/health").json()["active_requests"] + sum(each.done() for each in requests) >= TOGETHER)
    return requests


@contextmanager
def asking(daemon: Daemon, threads: ThreadPoolExecutor) -> Iterator[list[Future[list[str]]]]:
    """Clients of whoever is active who ask again as soon as they are answered, until this is left: at any moment one of
    them is being answered. Their answers are in what it yields."""
    with flashd.connect(daemon.address) as client:
        endpoint = client.status().endpoint
    ended = threading.Event()

    def ask(begun: threading.Event) -> list[str]:
        answers = [asked(endpoint, begun)]
        while not ended.is_set():
            answers.append(asked(endpoint, begun))
        return answers

    try:
        begun = threading.Event()
        clients = [threads.submit(ask, begun) for _ in range(2)]
        assert begun.wait(PATIENCE_S)
        yield clients
    finally:
        ended.set()


@of_both
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_engines_are_found_as_they_were_and_go_on(
    daemon: Daemon, manager: Manager | Keeper, end: signal.Signals
) -> None:
    before = engines(daemon)
    assert {model: state for model, (state, _) in before.items()} == {"carl": "serving", "ada": "parked"}
    with flashd.connect(daemon.address) as client:
        tiers = {model.name: model.residency for model in client.models()}
        endpoint = client.status().endpoint
    with ThreadPoolExecutor() as threads, asking(daemon, threads) as clients:
        daemon.stop(end)
        assert not any(client.done() for client in clients)
        assert Path(endpoint).exists(), "who asks meanwhile is answered"
        start(daemon, manager)
        assert engines(daemon) == before
        assert not any(client.done() for client in clients)
    answers = [answer for client in clients for answer in client.result()]
    assert all(answer.endswith("data: [DONE]\n\n") for answer in answers)
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "carl" and client.status().endpoint == endpoint
        assert {model.name: model.residency for model in client.models()} == tiers
        assert client.swap("ada").how == "wake" and client.chat("ada", WHO, temperature=0) == SAYS["ada"]
        assert client.swap("bob").how == "rebind" and client.chat("bob", WHO, temperature=0) == SAYS["bob"]
        client.park()
        assert client.swap("carl").how == "wake"
        pids = {pid for _, pid in before.values()}
        assert {engine.pid for engine in client.engines()} == pids
        for engine in client.engines():
            client.stop_engine(engine)
        assert client.engines() == [] and not any(is_alive(pid) for pid in pids)
    until(lambda: not kept(manager, "flashd-engine."))


@of_both
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_serves_beside_goes_on_beside(daemon: Daemon, manager: Manager | Keeper, end: signal.Signals) -> None:
    with flashd.connect(daemon.address) as client:
        client.serve("ada")
    before = engines(daemon)
    assert {model: state for model, (state, _) in before.items()} == {"carl": "serving", "ada": "serving"}
    daemon.stop(end)
    start(daemon, manager)
    assert engines(daemon) == before
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "carl" and client.would_displace("bob") == ["ada"]
        assert client.chat("ada", WHO, temperature=0) == SAYS["ada"] and client.status().active_model == "carl"
        rests(client)
    daemon.stop(end)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        assert client.status().resting_model == "carl"
        assert client.chat("ada", WHO, temperature=0) == SAYS["ada"], "it is brought beside what rests"
        assert client.status().resting_model == "carl"
        assert {engine.pid for engine in client.engines()} == {pid for _, pid in before.values()}


@of_both
def test_they_are_found_a_second_time(daemon: Daemon, manager: Manager | Keeper) -> None:
    before = engines(daemon)
    for _ in range(2):
        daemon.stop(signal.SIGKILL)
        start(daemon, manager)
    assert engines(daemon) == before
    with flashd.connect(daemon.address) as client:
        client.swap("bob")
        assert {engine.pid for engine in client.engines()} == {pid for _, pid in before.values()}
    daemon.stop(signal.SIGKILL)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "bob" and client.chat("bob", WHO, temperature=0) == SAYS["bob"]


def test_a_new_engine_comes_from_the_zygote_that_was_found(daemon: Daemon, manager: Manager) -> None:
    zygotes = kept(manager, "flashd-zygote.")
    daemon.stop(signal.SIGKILL)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        for engine in client.engines():
            client.stop_engine(engine)
        assert client.swap("ada").how == "start" and client.chat("ada", WHO, temperature=0) == SAYS["ada"]
    assert kept(manager, "flashd-zygote.") == zygotes and len(zygotes) == 1


@pytest.mark.parametrize("other", ["configuration", "environment"])
def test_who_was_started_with_other_settings_is_not_taken_up(
    daemon: Daemon, manager: Manager, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Else a setting that needs a restart would not be in force after one."""
    pids = [pid for _, pid in engines(daemon).values()]
    daemon.stop()
    if other == "configuration":
        daemon.config.write_text(CONFIG + "torch.max_tokens_default = 7\n")
    else:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    start(daemon, manager)
    until(lambda: not any(is_alive(pid) for pid in pids))
    assert engines(daemon) == {} and "it was started with other settings" in daemon.log.read_text()
    with flashd.connect(daemon.address) as client:
        assert client.swap("ada").how == "start"


def test_who_empties_the_store_ends_them(daemon: Daemon, manager: Manager) -> None:
    """As systemd does when the service is stopped."""
    pids = [pid for _, pid in engines(daemon).values()]
    daemon.stop()
    assert all(is_alive(pid) for pid in pids)
    manager.empty()
    until(lambda: not any(is_alive(pid) for pid in pids))
    start(daemon, manager)
    assert engines(daemon) == {}
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "" and not Path(client.status().endpoint).exists()


def test_one_that_dies_after_it_was_found_is_noticed(daemon: Daemon, manager: Manager) -> None:
    daemon.stop(signal.SIGKILL)
    start(daemon, manager)
    before = engines(daemon)
    os.kill(before["ada"][1], signal.SIGKILL)
    until(lambda: "ada" not in engines(daemon))
    os.kill(before["carl"][1], signal.SIGKILL)
    until(lambda: engines(daemon).get("carl", before["carl"])[1] != before["carl"][1])
    until(lambda: engines(daemon)["carl"][0] == "serving")  # the active one is brought back
    assert len(kept(manager, "flashd-engine.")) == 1


@of_both
def test_one_that_died_while_nobody_looked_is_not_found(daemon: Daemon, manager: Manager | Keeper) -> None:
    before = engines(daemon)
    daemon.stop(signal.SIGKILL)
    for _, pid in before.values():
        os.kill(pid, signal.SIGKILL)
    start(daemon, manager)
    assert engines(daemon) == {}
    until(lambda: not kept(manager, "flashd-engine."))
    with flashd.connect(daemon.address) as client:
        assert client.swap("ada").how == "start"


def test_one_whose_weights_are_not_kept_is_ended(daemon: Daemon, manager: Manager) -> None:
    """It answers from memory that no ledger counts."""
    before = engines(daemon)
    daemon.stop(signal.SIGKILL)
    for name in kept(manager, "flashd-arena."):
        manager.forget(name)
    start(daemon, manager)
    assert engines(daemon) == {"ada": before["ada"]}, "who is parked needs none"
    assert not is_alive(before["carl"][1])


def spoil(manager: Manager, name: str, how: str) -> None:
    with manager.lock:
        fds = manager.store[name]
        record = next(fd for fd in fds if "memfd" in os.readlink(f"/proc/self/fd/{fd}"))
        match how:
            case "record alone" | "channel alone":
                gone = record if how == "channel alone" else next(fd for fd in fds if fd != record)
                fds.remove(gone)
                os.close(gone)
            case "nonsense":
                os.pwrite(record, bytes(8), 0)
            case "another's":
                manager.store[name + "0"] = manager.store.pop(name)


@pytest.mark.parametrize("how", ["record alone", "channel alone", "nonsense", "another's"])
def test_what_makes_no_sense_is_let_go_of(daemon: Daemon, manager: Manager, how: str) -> None:
    before = engines(daemon)
    (ada, carl) = kept(manager, "flashd-engine.")
    daemon.stop(signal.SIGKILL)
    spoil(manager, carl, how)
    start(daemon, manager)
    assert engines(daemon) == {"ada": before["ada"]}
    until(lambda: kept(manager, "flashd-engine.") == [ada])
    until(lambda: not is_alive(before["carl"][1]))
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == ""
        assert client.swap("carl").how == "start"


@of_both
def test_one_in_the_middle_of_an_order_is_known_when_it_has_carried_it_out(
    daemon: Daemon, manager: Manager | Keeper
) -> None:
    before = engines(daemon)
    with ThreadPoolExecutor(TOGETHER) as threads:
        requests = in_flight(daemon, threads)
        with flashd.connect(daemon.address) as client:
            client.begin_swap("ada")  # its own engine wakes, and carl's waits for the one who is asking
            until(lambda: client.status().active_model == "ada")
        daemon.stop(signal.SIGKILL)
        start(daemon, manager)
        with flashd.connect(daemon.address) as client:
            assert client.status().active_model == "ada" and client.chat("ada", WHO, temperature=0) == SAYS["ada"]
        until(lambda: engines(daemon) == {"ada": ("serving", before["ada"][1]), "carl": ("parked", before["carl"][1])})
        assert all(answer.result().endswith("data: [DONE]\n\n") for answer in requests)


@of_both
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_who_rests_is_woken_by_a_question_to_the_next_one(
    daemon: Daemon, manager: Manager | Keeper, end: signal.Signals
) -> None:
    def says(client: flashd.Client) -> str:
        """Whoever answers, without being named."""
        transport = httpx.HTTPTransport(uds=client.status().endpoint)
        with httpx.Client(transport=transport, base_url="http://flashd", timeout=PATIENCE_S) as http:
            answer = http.post("/v1/chat/completions", json={"messages": WHO, "temperature": 0})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    with flashd.connect(daemon.address) as client:
        client.swap("ada")
        rests(client)
        client.lease("bob").release()  # is used later than ada, yet is not to be woken
    before = engines(daemon)
    daemon.stop(end)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "" and engines(daemon) == before
        assert says(client) == SAYS["ada"]
        assert client.status().active_model == "ada" and engines(daemon)["ada"][1] == before["ada"][1]
    daemon.stop(end)
    start(daemon, manager)
    with flashd.connect(daemon.address) as client:
        assert client.status().active_model == "ada", "it rests no more"


def test_who_rests_and_is_removed_meanwhile_is_not_woken(daemon: Daemon, manager: Manager) -> None:
    with flashd.connect(daemon.address) as client:
        rests(client)
        endpoint = Path(client.status().endpoint)
    daemon.stop(signal.SIGKILL)
    (daemon.runtime / "run" / "resting").write_text("torch\nnobody")
    start(daemon, manager)
    assert not endpoint.is_symlink(), "nobody is to be asked"
    assert "nobody no longer rests" in daemon.log.read_text()
