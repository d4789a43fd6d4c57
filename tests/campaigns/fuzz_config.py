# SPDX-License-Identifier: Apache-2.0
"""Settings files, values given to `flash config`, sizes, and command lines, made up from a seed.

A file is read or refused with an error of ours that fits on a screen; what was read is the same when it is written and
read again; a value that was accepted can be read by the next start of the daemon; a command line that makes no sense
gets an error with an exit status and never a traceback.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from campaign import Campaign, main
from typer.testing import CliRunner

from flashd import units
from flashd.cli.app import app
from flashd.cli.commands import HOMES
from flashd.config import loading
from flashd.config.paths import Paths
from flashd.errors import FlashdError

LONGEST_ERROR = 4000
DEEP = 3000
VALUES = [
    *("0", "1", "-1", "3.5", "1e400", "-0.0", "nan", "inf", "-inf", "true", "false", '""', '"auto"', '"64GB"'),
    *('"1e9GB"', '"9' + "9" * 400 + 'GB"', "1" * 5000, "0x" + "f" * 5000, '"\\u0000"', '"\\u202e\\u001b[31m"', "[]"),
    *('["a"]', "[1]", '["/a", 3]', "{}", "{a = 1}", "1979-05-27", "[[]]", '"' + "x" * 100_000 + '"', '["NAME"]'),
    *("[" * DEEP + "]" * DEEP, "{a=" * DEEP + "1" + "}" * DEEP, "{" + "a." * DEEP + "a=1}", "9" * 19, "1979-02-31"),
    *('"/etc"', '"~nobody-there/x"', '"relative"', "'lots'"),
]  # fmt: skip
KEYS = [setting.key for setting in loading.settings()]
WORDS = [
    *("--help", "--json", "--yes", "--engine", "vllm", "torch", "--name", "-", "--", "", "ada", "no/such/file"),
    *("/dev/null", "[brackets]", "\x1b[31mred", "\u202etxt", "a" * 5000, "1", "-1", "1e400", "nan", "--seconds"),
    *("--runs", "models", "all"),
]
# These wait for input, start a daemon, or download.
NOT_RUN = {"start", "watch", "top", "pull", "run", "auth", "bench"}


def run(campaign: Campaign) -> None:
    ways = [_file, _file, _mutated_file, _value, _size, _command_line]
    with tempfile.TemporaryDirectory(prefix="fuzz-config-") as scratch:
        folder = Path(scratch)
        _live_in(folder)
        while campaign.goes_on():
            campaign.random.choice(ways)(campaign, folder)


def _live_in(folder: Path) -> None:
    """No home, bus or daemon of anybody's is touched."""
    for variable in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        home = folder / variable.lower()
        home.mkdir()
        os.environ[variable] = str(home)
    os.environ["FLASHD_BUS_ADDRESS"] = f"unix:path={folder}/no-bus"
    os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)
    os.chdir(folder)


def _paths(folder: Path) -> Paths:
    return Paths(folder / "flashd.toml", folder / "state", folder / "run", folder / "models")


def _document(campaign: Campaign) -> str:
    chance, lines = campaign.random, []
    for _ in range(chance.randrange(1, 8)):
        key = chance.choice(KEYS).replace("NAME", chance.choice(['"Qwen/Qwen3"', "ada", '""', '"a.b"']))
        if chance.random() < 0.1:
            key = key[: chance.randrange(1, len(key))]
        lines.append(f"{key} = {chance.choice(VALUES)}")
    return "\n".join(lines)


def _file(campaign: Campaign, folder: Path) -> None:
    _read(campaign, folder, _document(campaign).encode())


def _mutated_file(campaign: Campaign, folder: Path) -> None:
    """A file that was good, with a few bytes changed."""
    chance = campaign.random
    raw = bytearray(loading.dump(loading.load(_paths(folder / "nothing"))).encode())
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(raw))
        raw[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    _read(campaign, folder, bytes(raw))


def _read(campaign: Campaign, folder: Path, raw: bytes) -> None:
    campaign.count("files")
    paths = _paths(folder)
    paths.config.write_bytes(raw)
    loaded = _tried(campaign, f"settings file {_short(raw)}", loading.load, paths)
    if loaded is not None:
        paths.config.write_text(loading.dump(loaded), encoding="utf-8")
        again = _tried(campaign, f"what was made of settings file {_short(raw)}", loading.load, paths)
        if again != loaded:
            campaign.finding(f"settings file {_short(raw)} is another after it was written and read again")


def _value(campaign: Campaign, folder: Path) -> None:
    """One setting changed, as SetConfig does it."""
    campaign.count("values")
    chance, paths = campaign.random, _paths(folder / "values")
    key = chance.choice(KEYS).replace("NAME", chance.choice(["Qwen/Qwen3", "ada", "a.b", '"', "é"]))
    value = chance.choice([*VALUES, "a\nb = 1", "]", '"""', "1\n[store]\nquota = 3", "\ud800", "\x00"])
    case = f"flash config {key} {_short(value.encode('utf-8', 'backslashreplace'))}"
    is_accepted = _tried(campaign, case, loading.set_value, paths, key, value) is not None
    if is_accepted and _tried(campaign, case, loading.load, paths) is None:
        campaign.finding(f"{case} was accepted, and the daemon would not start with it")
        (paths.drop_ins / loading.DROP_IN).unlink()


def _size(campaign: Campaign, folder: Path) -> None:
    campaign.count("sizes")
    alphabet = "0123456789.eE+- KMGTiB²٣\n"
    text = "".join(campaign.random.choices(alphabet, k=campaign.random.choice([1, 3, 6, 12, 400])))
    _tried(campaign, f"size {text[:80]!r}", units.parse_bytes, text)


def _command_line(campaign: Campaign, folder: Path) -> None:
    """Where there is no daemon, every command line ends with a status that the help documents."""
    campaign.count("command lines")
    chance = campaign.random
    command = chance.choice(sorted(HOMES.keys() - NOT_RUN))
    words = [command, *chance.choices(WORDS, k=chance.randrange(5))]
    result = CliRunner().invoke(app, words, input="")
    if result.exception is not None and not isinstance(result.exception, SystemExit | FlashdError):
        campaign.finding(f"flash {shlex.join(words)[:300]}: {result.exception!r}"[:LONGEST_ERROR])
    elif "Traceback" in result.output:
        campaign.finding(f"flash {shlex.join(words)[:300]}: a traceback")


def _tried(campaign: Campaign, case: str, call: Any, *arguments: Any) -> Any:
    """What the call returns; None if it refuses, as it may in words."""
    campaign.count("executions")
    try:
        return call(*arguments)
    except FlashdError as error:
        if len(str(error)) > LONGEST_ERROR or not error.message:
            campaign.finding(f"{case}: an error of {len(str(error))} characters: {str(error)[:200]}")
        return None
    except Exception as defect:  # noqa: BLE001 -- that is what we look for
        campaign.finding(f"{case}: {defect!r}"[:LONGEST_ERROR])
        return None


def _short(raw: bytes) -> str:
    return repr(raw if len(raw) <= 300 else raw[:200] + b"..." + raw[-60:])


if __name__ == "__main__":
    main(run, whole_s=300)
