# SPDX-License-Identifier: Apache-2.0
"""Text from outside is made printable, encodable and short, and remains recognisable."""

from __future__ import annotations

import io
import logging
import os
import random
import subprocess
import sys

import pytest

from flashd.errors import InvalidSource
from flashd.legible import legible
from flashd.legible_log import MAX_LINE_CHARACTERS, LegibleFormatter

ROUNDS = 3000
PIECES = [
    "model", "中文", "é", "\u0301", "\U0001f999", "\x00", "\x1b[31m", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff",
    "\u2028", "\r", "\n", "\t", "\ud800", "\udfff", "\udcff", "\u3164", "\U000e0041", "[/red]", "\\", "\\x1b", " ",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen3-0.6B [v2]", "Qwen/Qwen3-0.6B [v2]"),
        ("\u901a\u4e49\u5343\u95ee", "\u901a\u4e49\u5343\u95ee"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\u202eb\u200bc", r"a\u202eb\u200bc"),
        ("two\nlines\r", r"two\nlines\r"),
        ("nul\0", r"nul\x00"),
        (os.fsdecode(b"mod\xe8le"), r"mod\xe8le"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert legible(text) == shown


def test_newlines_stay_where_they_are_wanted() -> None:
    assert legible("one\ntwo\r\x1b", keep="\n") == "one\ntwo\\r\\x1b"


def test_long_text_keeps_its_ends() -> None:
    shown = legible("begin" + "x" * 10_000_000 + "end", 100)
    assert len(shown) == 100 and shown.startswith("begin") and shown.endswith("end") and "…" in shown


def test_any_text_becomes_safe() -> None:
    random.seed(17)
    for _ in range(ROUNDS):
        made = "".join(random.choices(PIECES, k=random.randrange(40)))
        text = random.choice([made, os.fsdecode(random.randbytes(random.randrange(60)))])
        limit = random.randrange(1, 200)
        shown = legible(text, limit)
        assert shown.isprintable() and len(shown) <= limit, ascii(text)
        shown.encode()
        assert legible(shown, limit) == shown, ascii(text)


def test_every_error_is_safe_and_bounded() -> None:
    name = os.fsdecode(b"bad\xff\x00\x1b[31m")
    error = InvalidSource(f"{name} is\nnot readable " + "x" * 100_000, hint=f"rename\n{name}" + "y" * 100_000)
    assert len(str(error)) < 2500
    assert error.message.startswith(r"bad\xff\x00\x1b[31m is not readable")
    assert error.hint.startswith("rename\nbad\\xff")
    error.to_bus().encode()


HOSTILE = "ada\n2026-01-01 00:00:00 ERROR flashd: all models are lost \x1b[2J\u202e\udcff\r"
DAEMON = "from flashd.daemon.main import _log; _log('INFO')"
# The real main, with its work replaced by the least that logs.
INBOX = "import asyncio; from flashd import user_inbox; asyncio.run = lambda work: work.close(); user_inbox.main([])"


@pytest.mark.parametrize("set_up", [DAEMON, INBOX], ids=["flashd", "flashd-inbox"])
def test_programs_log_one_legible_line_whatever_a_name_says(set_up: str) -> None:
    code = f"{set_up}; import logging; logging.getLogger('flashd.store').warning('%s is damaged', {HOSTILE!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    (line,) = done.stderr.decode().split("\n")[:-1]
    assert line.isprintable() and line.endswith(r"ada; 2026-01-01 00:00:00 ERROR flashd: all models are lost "
                                                r"\x1b[2J\u202e\xff\r is damaged")  # fmt: skip


def test_a_logged_traceback_cannot_pass_for_another_record_and_is_bounded() -> None:
    log, written = logging.Logger("flashd"), io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LegibleFormatter("%(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("defect")
    first, *rest = written.getvalue().removesuffix("\n").split("\n")
    assert first == "ERROR flashd: defect"
    assert rest and all(line.startswith("  ") and line.isprintable() for line in rest)
    written.truncate(0)
    log.error("x" * 1_000_000)
    assert len(written.getvalue()) < 2 * MAX_LINE_CHARACTERS
