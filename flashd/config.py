# SPDX-License-Identifier: Apache-2.0
"""What is configured, by whom, and where do our files lie? The only reader of the environment.

Settings come, each overriding the one before, from: the defaults below; `flashd.toml`; the drop-ins
`flashd.toml.d/*.toml` in order of name; the command line. A key that is not known is an error, as is a value of the
wrong type: a typing error never silently means the default.

A field that ends in `_bytes` is a size: its key has no suffix, and its value is written as people write sizes
(`host_budget = "64GB"`). What one model has different stands in a section of its own, `[models."NAME"]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import os
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from flashd.errors import InvalidArgument, TransferFailed
from flashd.units import GiB, KiB, MiB, parse_bytes

# `flash config` writes here, and not into flashd.toml, whose comments a person may want to keep. It is read last.
DROP_IN = "zz-flash-config.toml"


def _setting(default: Any, doc: str, *, live: bool = False) -> Any:
    """A field with its documentation; `live` if a change is in force at once."""
    return field(default=default, metadata={"doc": doc, "live": live})


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """[store]: what we have, on NVMe."""

    path: Path = _setting(  # noqa: RUF009 -- it is field(), with less to repeat
        Path(), "Folder of the checkpoints. Default: store, in the state directory."
    )
    quota_bytes: int = _setting(0, "The most that checkpoints may take on disk; 0 for no limit.")
    keep_versions: int = _setting(1, "Older versions of each model that are kept.")
    private_group: str = _setting("", "Group whose members see private models too. Default: only the owner, and root.")


@dataclass(frozen=True, slots=True)
class InboxConfig:
    """[inbox]: folders whose sources become models by themselves."""

    folders: tuple[Path, ...] = _setting((), "Folders watched. Default: ~/models for a user.")
    settle_s: float = _setting(2.0, "A source is converted when nothing in it changed for so long.")
    rescan_s: float = _setting(30.0, "Folders are looked at this often even if the kernel reports no event.")
    private: bool = _setting(False, "Whether models made of what is dropped here are private to whose inbox it is.")
    on_remove: Literal["keep", "remove"] = _setting(
        "keep", "What becomes of a model whose source is removed from the inbox.", live=True
    )


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """[memory]: where bytes are now."""

    host_budget_bytes: int = _setting(0, "The most that arenas may take of host memory; 0 chooses by the machine.")
    huge_pages: Literal["auto", "off"] = _setting("auto", "Whether arenas use huge pages where the machine has them.")
    device_budget_bytes: int = _setting(0, "The most that arenas may take of each GPU; 0: all but the reserve.")
    device_reserve_bytes: int = _setting(8 * GiB, "What is left of each GPU to engines and others; half of it at most.")
    unified: Literal["auto", True, False] = _setting(
        "auto", "Whether host memory is the GPU's memory too, so that weights are never copied; auto asks the GPU."
    )
    simulated_device_bytes: int = _setting(
        0, "Size of a GPU to simulate in host memory, to develop for one where there is none; 0: no such thing."
    )
    prewarm: tuple[str, ...] = _setting(
        (), "Models that are loaded when the daemon starts, the first of them first, as far as there is room."
    )
    prewarm_tier: Literal["host", "device"] = _setting("host", "Where to; device means the first GPU.")


@dataclass(frozen=True, slots=True)
class StreamerConfig:
    """[streamer]: how bytes get from disk to memory."""

    block_bytes: int = _setting(8 * MiB, "Size of one read.")
    depth: int = _setting(12, "Reads in flight.")
    backend: Literal["auto", "io_uring", "threads"] = _setting("auto", "How reads are issued.")
    direct: bool = _setting(True, "Past the page cache, by O_DIRECT, where the file system can.")
    verify: bool = _setting(True, "Compare what is loaded with its digests.")
    stall_timeout_s: float = _setting(
        180.0,
        "A transfer that moves nothing for so long is stuck, and the service manager starts the daemon anew; 0: never.",
        live=True,
    )
    staging_bytes: int = _setting(256 * MiB, "Pinned memory of each GPU, through which all that is read for it passes.")


@dataclass(frozen=True, slots=True)
class TorchConfig:
    """[engines.torch]: the engine on PyTorch and transformers."""

    python: str = _setting(
        "",
        "Interpreter that has torch, transformers and this version of flashd. "
        "Default: what flash engine install made, else the daemon's own.",
    )
    threads: int = _setting(0, "Threads of one engine; 0 for as many as there are cores.")
    max_tokens_default: int = _setting(512, "Tokens generated for a request that does not say how many.")


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """[engines.vllm]: vLLM, in an environment of its own."""

    python: str = _setting(
        "",
        "Interpreter that has vLLM and this version of flashd. "
        "Default: what flash engine install made, else the daemon's own.",
    )
    arguments: tuple[str, ...] = _setting((), "What every engine is told besides, as to vllm serve.")
    environment: tuple[str, ...] = _setting(
        (), "NAME=VALUE, for its processes; besides those they find the daemon's own, as NCCL_* and TORCH_*."
    )
    adapters: tuple[str, ...] = _setting(
        (), "LoRA adapters that it applies to requests which name them: NAME=FOLDER, or FOLDER."
    )
    kv_cache_bytes: int = _setting(2 * GiB, "KV cache of each engine; 0: as vLLM sees fit, most of the memory.")


@dataclass(frozen=True, slots=True)
class EnginesConfig:
    """[engines]: who answers."""

    default: Literal["torch", "vllm"] = _setting("torch", "Kind of engine for a swap that does not say.")
    warm_up: bool = _setting(True, "Import the framework before the first swap; costs its memory from then on.")
    warm_new: bool = _setting(
        True, "Load a new model, and make its image, while nothing else is to do and where memory is free.", live=True
    )
    max_parked: int = _setting(2, "Engines kept parked; the one parked longest ago is stopped first.")
    spare_bytes: int = _setting(
        0, "While the machine has less memory available, parked engines are stopped; 0: a 64th of it.", live=True
    )
    drain_timeout_s: float = _setting(10.0, "Requests in flight may take so long to finish before a swap cuts them.")
    start_timeout_s: float = _setting(
        600.0, "An engine that does not answer after so long has failed; the first of an architecture compiles first."
    )
    idle_timeout_s: float = _setting(
        0.0, "Park the active model after so long without requests, until the next one wakes it; 0: never.", live=True
    )
    on_idle: Literal["park", "evict"] = _setting(
        "park", "Whether a model that was idle for so long is only parked, or also evicted from memory.", live=True
    )
    prewarm: str = _setting(
        "", "Model that is made active when the daemon starts, unless another one is. Default: none."
    )
    torch: TorchConfig = field(default_factory=TorchConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """[models.NAME]: what one model has different from the others; "default" is what [engines] says."""

    engine: Literal["default", "torch", "vllm"] = _setting(
        "default", "Kind of engine for the model NAME, for a swap that does not say.", live=True
    )
    idle_timeout_s: float | Literal["default"] = _setting(
        "default", "The same as engines.idle_timeout_s, for this model; 0: it stays active.", live=True
    )
    arguments: tuple[str, ...] = _setting(
        (), "What its vLLM engine is told besides engines.vllm.arguments, when a swap starts one for it.", live=True
    )
    kv_cache_bytes: int | Literal["default"] = _setting(
        "default", "KV cache of its vLLM engine, as engines.vllm.kv_cache.", live=True
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """[limits]: the most that one user may have at once; of what ends with its connection, one has half at most."""

    calls: int = _setting(256, "Calls of one user that wait for their answer.", live=True)
    jobs: int = _setting(256, "Jobs of one user that have not ended.", live=True)
    leases: int = _setting(512, "Leases of one user.", live=True)
    imports: int = _setting(16, "Imports of one user that wait for files.", live=True)
    descriptors: int = _setting(8192, "Files of one user's imports that are open until they are converted.", live=True)
    models: int = _setting(
        2000, "Models of one user; the machine's own, in its models folder, are not counted.", live=True
    )


@dataclass(frozen=True, slots=True)
class BusConfig:
    """[bus]: how we are reached."""

    address: str = _setting("", "session, system or a D-Bus address. Default: system for root, else session.")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set."""

    store: StoreConfig = field(default_factory=StoreConfig)
    inbox: InboxConfig = field(default_factory=InboxConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    streamer: StreamerConfig = field(default_factory=StreamerConfig)
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    bus: BusConfig = field(default_factory=BusConfig)

    def model(self, *names: str) -> ModelConfig:
        """What a model that has these names has different; the first of them that is configured counts."""
        return next((self.models[name] for name in names if name in self.models), ModelConfig())


class Scope(enum.Enum):
    """Whose daemon it is: a user's own, or the machine's."""

    USER = "user"
    SYSTEM = "system"


# Of the machine's engines, which run in units of their own (systemd/flashd-engine@.service): where these are asked for,
# and where they may keep what they compile.
ENGINE_SOCKET = Path("/run/flashd-engine.socket")
ENGINE_STATE = Path("/var/lib/flashd-engine")
_OF_FRAMEWORKS = ("CUDA_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "VLLM_")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things lie unless somebody says otherwise."""

    config: Path  # flashd.toml
    state: Path
    runtime: Path
    models: Path

    @property
    def drop_ins(self) -> Path:
        return self.config.with_name(self.config.name + ".d")


def default_paths(scope: Scope) -> Paths:
    """By the XDG base directory specification for a user, by the file system hierarchy for the machine."""
    if scope is Scope.SYSTEM:
        state = Path("/var/lib/flashd")
        return Paths(Path("/etc/flashd/flashd.toml"), state, Path("/run/flashd"), state / "models")
    home = Path.home()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Paths(
        config=_xdg("XDG_CONFIG_HOME", home / ".config") / "flashd" / "flashd.toml",
        state=_xdg("XDG_STATE_HOME", home / ".local/state") / "flashd",
        runtime=Path(runtime) / "flashd" if runtime else Path(f"/tmp/flashd-{os.getuid()}"),
        models=home / "models",
    )


def cache_folder() -> Path:
    """What can be had again: downloads under way."""
    return _xdg("XDG_CACHE_HOME", Path.home() / ".cache") / "flashd"


def bus_address() -> str | None:
    """Where a client was told to find the daemon, if it was."""
    return os.environ.get("FLASHD_BUS_ADDRESS") or None


def has_session_bus() -> bool:
    """Whether this process belongs to a login session with a bus of its own."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return bool(os.environ.get("DBUS_SESSION_BUS_ADDRESS")) or bool(runtime and (Path(runtime) / "bus").exists())


def notify_socket() -> str | None:
    """Where the service manager waits for our readiness (sd_notify(3)), if one does."""
    return os.environ.get("NOTIFY_SOCKET") or None


def watchdog_s() -> float | None:
    """How long the service manager waits for a sign of life (sd_watchdog_enabled(3)), if it does."""
    told, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    is_ours = told.isdecimal() and pid in {"", str(os.getpid())}
    return int(told) / 1e6 if is_ours else None


def is_journal(fd: int) -> bool:
    """Whether what is written to a descriptor goes to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        status = os.fstat(fd)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def inherited_fds() -> list[tuple[int, str]]:
    """Descriptors that the service manager kept for us, with their names (sd_listen_fds(3)).

    They are taken once: engines, our children, are not to believe that these are theirs. Numbers that name no open
    descriptor are passed over.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    first = 3
    found = []
    for fd in range(first, first + min(int(count), os.sysconf("SC_OPEN_MAX"))):
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            found.append((fd, names[fd - first] if fd - first < len(names) else ""))
    return found


def load(paths: Paths, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in force: defaults, file, drop-ins, then `overrides` (dotted key to TOML value)."""
    config = _with_default_paths(Config(), paths)
    for file in [paths.config, *sorted(paths.drop_ins.glob("*.toml"))]:
        config = _merged(config, _read(file), "", str(file))
    for key, value in (overrides or {}).items():
        config = _merged(config, _nested(key, value), "", "the command line")
    return config


def dump(config: Config) -> str:
    """The TOML document that `load` reads back as this configuration."""
    return tomli_w.dumps(_table(config))


def set_value(paths: Paths, key: str, text: str) -> Setting:
    """Changes one setting, for good: `text` is a TOML value, or a bare word for a string.

    Raises InvalidArgument, and then nothing was written.
    """
    setting = find(key)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target = paths.drop_ins / DROP_IN
    document = _read(target)
    _insert(document, _parts(key), value)
    _merged(Config(), document, "", key)
    _publish(target, tomli_w.dumps(document))
    return setting


@dataclass(frozen=True, slots=True)
class Setting:
    """One key, for people: what it means, what it is by default, whether a change is in force at once."""

    key: str
    default: Any
    doc: str
    live: bool


def settings() -> Iterator[Setting]:
    """Every setting there is, in the order of this file."""
    yield from _settings(Config(), "")


def find(key: str) -> Setting:
    """A setting by its key; that of one model has its name in place of NAME."""
    known = {setting.key: setting for setting in settings()}
    section, *names = _parts(key)
    general = f"models.NAME.{names[1]}" if section == "models" and all(names) else key
    if general not in known:
        raise InvalidArgument(f"there is no setting {key!r}", hint=_nearest(general, known))
    return known[general]


def value_of(config: Config, key: str) -> Any:
    """The value of a setting, as TOML has it."""
    return value_in(_table(config), key)


def value_in(document: Mapping[str, Any], key: str) -> Any:
    """The same of a configuration that was dumped."""
    default = find(key).default
    *sections, last = _parts(key)
    for section in sections:
        document = document.get(section, {})
    return document.get(last, default)


def with_value(config: Config, key: str, value: Any) -> Config:
    """The configuration with one setting changed to a TOML value."""
    changed: Config = _merged(config, _nested(key, value), "", key)
    return changed


def engine_python(config: Config, kind: str, installed: str) -> str:
    """The interpreter that engines of a kind run in: the one configured, else the one installed, else our own."""
    configured = {"torch": config.engines.torch.python, "vllm": config.engines.vllm.python}[kind]
    return configured or installed or sys.executable


def show_gpus(ordinals: Sequence[int]) -> None:
    """Has this process and its children use these GPUs of those that it sees, and see no other."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else None
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[ordinal] if names else str(ordinal) for ordinal in ordinals)


def variables(assignments: Sequence[str], key: str) -> Mapping[str, str]:
    """NAME=VALUE as a table. Raises InvalidArgument for what is none, naming the setting."""
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise InvalidArgument(f"{key} has {assignment!r}", hint='write it like ["NAME=VALUE"]')
    return dict(assignment.split("=", 1) for assignment in assignments)


def child_environment(changes: Mapping[str, str]) -> Mapping[str, str]:
    """Our environment with changes, for processes that are configured that way."""
    return {**os.environ, **changes}


def for_engines() -> Mapping[str, str]:
    """What frameworks go by in our environment, for engines in units of their own: which GPU is the first, say, or what
    compilers are to leave out, must be the same for them. Folders for caches are not: another user writes to them."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_OF_FRAMEWORKS) and not name.endswith("_CACHE_DIR")
    }


def _xdg(variable: str, default: Path) -> Path:
    """Relative paths are to be ignored, says the specification."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else default


def _with_default_paths(config: Config, paths: Paths) -> Config:
    return dataclasses.replace(
        config,
        store=dataclasses.replace(config.store, path=paths.state / "store"),
        inbox=dataclasses.replace(config.inbox, folders=(paths.models,)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not TOML: {error}", hint="correct that line, or move the file away") from None
    except OSError as error:
        raise TransferFailed(f"cannot read {path}: {error.strerror}") from None


def _key(name: str) -> str:
    return name.removesuffix("_bytes")


def _parts(key: str) -> list[str]:
    """models.Qwen/Qwen3-0.6B.engine has three: names of models may have dots, settings have none."""
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
    """The section with what the table says replaced."""
    names = {_key(item.name): item.name for item in dataclasses.fields(section)}
    hints = typing.get_type_hints(type(section))
    changes = {}
    for key, value in table.items():
        if key not in names:
            known = {setting.key for setting in settings()}
            raise InvalidArgument(f"{where}: there is no setting {prefix}{key}", hint=_nearest(prefix + key, known))
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


def _as_section(value: Any, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: {key} is a section, not a value", hint=f"write [{key}]")
    return value


def _checked(name: str, value: Any, wanted: Any, where: str) -> Any:
    """A TOML value as the type of its field."""
    if typing.get_origin(wanted) in {typing.Union, types.UnionType}:  # or a word in its place
        wanted, words = typing.get_args(wanted)
        if value in typing.get_args(words):
            return value
    if name.endswith("_bytes") and isinstance(value, str | int) and not isinstance(value, bool):
        value = parse_bytes(value)
    if typing.get_origin(wanted) is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in typing.get_args(wanted)):
            raise InvalidArgument(f"{where} cannot be {value!r}", hint=f"use {_either(typing.get_args(wanted))}")
        return value
    if typing.get_origin(wanted) is tuple:
        (element, _) = typing.get_args(wanted)
        if not isinstance(value, list):
            raise InvalidArgument(f"{where} is a list", hint='write it like ["one", "two"]')
        return tuple(_checked(name, item, element, where) for item in value)
    if wanted is Path and isinstance(value, str) and value:
        path = Path(value).expanduser()
        if not path.is_absolute():
            raise InvalidArgument(f"{where} is {value!r}, which is relative", hint="write the whole path")
        return path
    accepted: Any = {float: int | float}.get(wanted, wanted)
    if wanted is Path or not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise InvalidArgument(f"{where} cannot be {value!r}", hint=f"it is {_noun(wanted)}")
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise InvalidArgument(f"{where} cannot be {value!r}", hint="it is a number from 0 up")
    return wanted(value)


def _noun(wanted: type | types.GenericAlias) -> str:
    nouns: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path",
    }  # fmt: skip
    return nouns[wanted]


def _either(choices: tuple[str | bool, ...]) -> str:
    return " or ".join(str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "flash config lists all settings"


def _table(section: Any) -> dict[str, Any]:
    return {_key(item.name): _plain(item.name, getattr(section, item.name)) for item in dataclasses.fields(section)}


def _plain(name: str, value: Any) -> Any:
    """A field's value as TOML."""
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
    """The shortest way to write exactly this size."""
    for unit, factor in (("GiB", GiB), ("GB", 10**9), ("MiB", MiB), ("MB", 10**6), ("KiB", KiB)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return size_bytes


def _nested(key: str, value: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    _insert(table, _parts(key), value)
    return table


def _insert(table: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        table = table.setdefault(part, {})
    table[parts[-1]] = value


def _publish(path: Path, text: str) -> None:
    """By rename: a crash leaves the old settings or the new ones."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        hint = "is the folder writable for the daemon? Else write the setting into flashd.toml by hand"
        raise TransferFailed(f"cannot write {path}: {error.strerror}", hint=hint) from None
