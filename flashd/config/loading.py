# SPDX-License-Identifier: Apache-2.0
"""Reads and writes settings.

Sources, each overriding the previous ones, are: the defaults; `flashd.toml`; the drop-ins `flashd.toml.d/*.toml` in
order of name; the command line. An unknown key and a value of the wrong type are errors, so a typing error never
silently means the default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from flashd import toml
from flashd.config.paths import Paths
from flashd.config.settings import Config, ModelConfig
from flashd.durable import Unconfirmed, read_toml, replace_file
from flashd.errors import InvalidArgument, TransferFailed
from flashd.units import GiB, KiB, MiB, parse_bytes

# `flash config` writes to this drop-in, which is read last, because rewriting flashd.toml would lose its comments.
DROP_IN = "zz-flash-config.toml"
_LONGEST_SHOWN = 200


def load(paths: Paths, overrides: Mapping[str, object] | None = None) -> Config:
    """Returns the configuration from defaults, file, drop-ins, and `overrides` (dotted key to TOML value)."""
    config = _with_default_paths(Config(), paths)
    for file in [paths.config, *sorted(paths.drop_ins.glob("*.toml"))]:
        config = _merged(config, _read(file), "", str(file))
    for key, value in (overrides or {}).items():
        config = _merged(config, _nested(key, value), "", "the command line")
    return config


def dump(config: Config) -> str:
    """Returns a TOML document that `load` would read as this configuration."""
    return tomli_w.dumps(_table(config))


def set_value(paths: Paths, key: str, text: str) -> Setting:
    """Changes one setting permanently. `text` is a TOML value, or a bare word for a string.

    Raises InvalidArgument, without writing anything.
    """
    setting = find(key)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"the value of {key} is not UTF-8", hint="TOML allows no other encoding") from None
    try:
        value = toml.parse(f"value = {text}")["value"]
    except ValueError:
        value = text
    if isinstance(setting.default, list) and not isinstance(value, list):
        raise InvalidArgument(f"{key} is a list", hint=f"write it like this: {_as_command(key, text)}")
    target = paths.drop_ins / DROP_IN
    document = _read(target)
    _insert(document, _parts(key), value)
    _merged(Config(), document, "", key)
    _publish(target, tomli_w.dumps(document))
    return setting


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as shown to users: its meaning, its default, and whether a change takes effect at once."""

    key: str
    default: object
    doc: str
    live: bool


def settings() -> Iterator[Setting]:
    """Yields all settings, in the order of settings.py."""
    yield from _settings(Config(), "")


def _as_command(key: str, text: str) -> str:
    """Returns the command that was meant by a text that is not a list: [a,b] is what a shell leaves of ["a","b"]."""
    words = [word.strip(" \t\"'") for word in text[:_LONGEST_SHOWN].strip(" []").split(",")]
    return f"flash config {key} {shlex.quote(json.dumps([word for word in words if word], ensure_ascii=False))}"


def find(key: str) -> Setting:
    """Returns a setting by its key. In a key of one model, the model's name replaces NAME."""
    known = {setting.key: setting for setting in settings()}
    section, *names = _parts(key)
    general = f"models.NAME.{names[1]}" if section == "models" and all(names) else key
    if general not in known:
        raise InvalidArgument(f"there is no setting {_shown(key)}", hint=_nearest(general, known))
    return known[general]


def value_of(config: Config, key: str) -> Any:
    """Returns the value of a setting, as in TOML."""
    return value_in(_table(config), key)


def value_in(document: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a setting in a dumped configuration."""
    default = find(key).default
    *sections, last = _parts(key)
    for section in sections:
        document = document.get(section, {})
    return document.get(last, default)


def with_value(config: Config, key: str, value: object) -> Config:
    """Returns the configuration with one setting changed to a TOML value."""
    changed: Config = _merged(config, _nested(key, value), "", key)
    return changed


def _with_default_paths(config: Config, paths: Paths) -> Config:
    return dataclasses.replace(
        config,
        store=dataclasses.replace(config.store, path=paths.state / "store"),
        inbox=dataclasses.replace(config.inbox, folders=(paths.models,)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidArgument(
            f"{path} is not TOML: {error}", hint="correct this line, or move the file to another place"
        ) from None
    except OSError as error:
        raise TransferFailed(f"cannot read {path}: {error.strerror}") from None


def _key(name: str) -> str:
    return name.removesuffix("_bytes")


def _parts(key: str) -> list[str]:
    """Splits a key. models.Qwen/Qwen3-0.6B.engine has three parts: names of models may contain dots, settings none."""
    section, _, rest = key.partition(".")
    if section != "models":
        return key.split(".")
    name, _, last = rest.rpartition(".")
    return [section, name.strip('"'), last]


def _settings(section: Any, prefix: str) -> Iterator[Setting]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{item.name}.")
        elif isinstance(value, Mapping):
            yield from _settings(ModelConfig(), f"{prefix}{item.name}.NAME.")
        else:
            yield Setting(
                prefix + _key(item.name), _plain(item.name, value), item.metadata["doc"], item.metadata["live"]
            )


def _merged(section: Any, table: Mapping[str, Any], prefix: str, where: str) -> Any:
    """Returns the section with the values of a table."""
    names = {_key(item.name): item.name for item in dataclasses.fields(section)}
    hints = typing.get_type_hints(type(section))
    changes = {}
    for key, value in table.items():
        if key not in names:
            known = {setting.key for setting in settings()}
            raise InvalidArgument(
                f"{where}: there is no setting {_shown(prefix + key)}", hint=_nearest(prefix + key, known)
            )
        name, old = names[key], getattr(section, names[key])
        if dataclasses.is_dataclass(old):
            changes[name] = _merged(old, _as_section(value, prefix + key, where), f"{prefix}{key}.", where)
        elif isinstance(old, Mapping):
            changes[name] = dict(old) | {
                model: _merged(
                    old.get(model, ModelConfig()),
                    _as_section(table, f'{prefix}{key}."{model}"', where),
                    f"{prefix}{key}.{model}.",
                    where,
                )
                for model, table in _as_section(value, prefix + key, where).items()
            }
        else:
            changes[name] = _checked(name, value, hints[name], f"{where}: {prefix}{key}")
    return dataclasses.replace(section, **changes)


def _as_section(value: object, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: {key} is a section, not a value", hint=f"write [{key}]")
    return value


def _checked(name: str, value: object, wanted: Any, where: str) -> Any:
    """Converts a TOML value to the type of its field. Raises InvalidArgument."""
    if typing.get_origin(wanted) in {typing.Union, types.UnionType}:  # a type, or one of some words instead
        wanted, words = typing.get_args(wanted)
        if value in typing.get_args(words):
            return value
    if name.endswith("_bytes") and isinstance(value, str | int) and not isinstance(value, bool):
        value = parse_bytes(value)
    if typing.get_origin(wanted) is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in typing.get_args(wanted)):
            raise InvalidArgument(f"{where} cannot be {_shown(value)}", hint=f"use {_either(typing.get_args(wanted))}")
        return value
    if typing.get_origin(wanted) is tuple:
        (element, _) = typing.get_args(wanted)
        if not isinstance(value, list):
            raise InvalidArgument(f"{where} is a list", hint='write it like ["one", "two"]')
        return tuple(_checked(name, item, element, where) for item in value)
    if isinstance(value, str) and "\0" in value:  # paths, arguments and variables of processes cannot contain it
        raise InvalidArgument(f"{where} cannot be {_shown(value)}", hint="remove the zero byte from it")
    if wanted is Path and isinstance(value, str) and value:
        path = Path(value)
        with contextlib.suppress(RuntimeError):  # the ~ of an unknown user stays, so the path is relative
            path = path.expanduser()
        if not path.is_absolute():
            raise InvalidArgument(f"{where} is {_shown(value)}, which is relative", hint="write an absolute path")
        return path
    accepted: Any = {float: int | float}.get(wanted, wanted)
    if wanted is Path or not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise InvalidArgument(f"{where} cannot be {_shown(value)}", hint=f"write {_noun(wanted)}")
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise InvalidArgument(f"{where} cannot be {_shown(value)}", hint="write a number not below 0")
    return wanted(value)


def _noun(wanted: type | types.GenericAlias) -> str:
    nouns: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path",
    }  # fmt: skip
    return nouns[wanted]


def _either(choices: tuple[str | bool, ...]) -> str:
    return " or ".join(str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)


def _shown(value: object) -> str:
    """Formats a value for an error, shortened to fit on a screen."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:_LONGEST_SHOWN], list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "flash config lists all settings"


def _table(section: Any) -> dict[str, Any]:
    return {_key(item.name): _plain(item.name, getattr(section, item.name)) for item in dataclasses.fields(section)}


def _plain(name: str, value: object) -> object:
    """Converts a field's value for TOML."""
    if dataclasses.is_dataclass(value):
        return _table(value)
    if isinstance(value, tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _table(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return _size(value) if name.endswith("_bytes") and isinstance(value, int) else value


def _size(size_bytes: int) -> str | int:
    """Formats exactly this size in the shortest way."""
    for unit, factor in (("GiB", GiB), ("GB", 10**9), ("MiB", MiB), ("MB", 10**6), ("KiB", KiB)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return size_bytes


def _nested(key: str, value: object) -> dict[str, Any]:
    table: dict[str, Any] = {}
    _insert(table, _parts(key), value)
    return table


def _insert(table: dict[str, Any], parts: list[str], value: object) -> None:
    for part in parts[:-1]:
        table = table.setdefault(part, {})
    table[parts[-1]] = value


def _publish(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except Unconfirmed as error:
        hint = "a power failure may undo the change; look for disk errors in dmesg, then repeat the change"
        what = f"{path} was written, but the disk did not confirm it: {error.strerror}"
        raise TransferFailed(what, hint=hint) from None
    except OSError as error:
        hint = "make the folder writable for the daemon, or write the setting into flashd.toml by hand"
        raise TransferFailed(f"cannot write {path}: {error.strerror}", hint=hint) from None
