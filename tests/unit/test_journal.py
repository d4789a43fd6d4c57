# SPDX-License-Identifier: Apache-2.0
"""Messages to the journal, byte by byte; tests/system reads the real journal."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashd.config.environment import is_journal
from flashd.daemon.lifecycle.journal import JournalHandler, fields


@pytest.fixture
def journal() -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"{folder}/socket")
        listening.settimeout(5)
        yield listening


@pytest.fixture
def log(journal: socket.socket) -> Iterator[logging.Logger]:
    handler = JournalHandler(Path(journal.getsockname()))
    logger = logging.Logger("flashd.test")
    logger.addHandler(handler)
    yield logger
    handler.close()


def entry(journal: socket.socket) -> dict[str, str]:
    """A datagram, as the protocol's document says it is read."""
    data, found = journal.recv(1 << 20), {}
    while data:
        name, _, rest = data.partition(b"\n")
        size = int.from_bytes(rest[:8], "little")
        found[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        data = rest[9 + size :]
    return found


def test_a_record_arrives_with_its_fields(journal: socket.socket, log: logging.Logger) -> None:
    log.warning("%s is slow", "ada", extra=fields(model="ada", job=3, tier="host", size_bytes=7, seconds=0.25))
    found = entry(journal)
    assert found["MESSAGE"] == "flashd.test: ada is slow"
    assert (found["PRIORITY"], found["SYSLOG_IDENTIFIER"]) == ("4", "flashd")
    ours = {name: value for name, value in found.items() if name.startswith("FLASHD_")}
    assert ours == {
        "FLASHD_MODEL": "ada", "FLASHD_JOB": "3", "FLASHD_TIER": "host", "FLASHD_BYTES": "7",
        "FLASHD_SECONDS": "0.250000",
    }  # fmt: skip


def test_what_is_not_known_is_no_field(journal: socket.socket, log: logging.Logger) -> None:
    log.info("hello", extra=fields(model="ada"))
    assert [name for name in entry(journal) if name.startswith("FLASHD_")] == ["FLASHD_MODEL"]


def test_no_value_begins_a_field_of_its_own(journal: socket.socket, log: logging.Logger) -> None:
    log.error("one\nPRIORITY=0\nMESSAGE=two\udcff", extra=fields(model="x\nFLASHD_JOB=9"))
    found = entry(journal)
    assert found["PRIORITY"] == "3"
    assert found["MESSAGE"] == r"flashd.test: one; PRIORITY=0; MESSAGE=two\xff"
    assert "FLASHD_JOB" not in found


def test_a_traceback_is_in_the_message(journal: socket.socket, log: logging.Logger) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        log.exception("defect")
    assert "ZeroDivisionError" in entry(journal)["MESSAGE"]


def test_without_a_journal_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("flashd.test")
    logger.addHandler(handler := JournalHandler(tmp_path / "nobody"))
    logger.error("all the same")
    handler.close()
    assert "all the same" in capsys.readouterr().err


def test_only_the_stream_that_systemd_names_is_the_journals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert is_journal(stream.fileno())
        assert not is_journal(0)
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not is_journal(stream.fileno())
