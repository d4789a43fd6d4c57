# SPDX-License-Identifier: Apache-2.0
"""Contents of the menu and the tooltip. Pure: from a snapshot and the preferences to descriptions.

Every entry has a key that stays the same as long as its place and meaning do. The shell changes entries in place if all
keys are the same, so that an open menu does not close or jump under the pointer because a percentage has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flashd.client.results import Device, Model
from flashd.errors import Cancelled, OutOfMemory
from flashd_tray.plain import line
from flashd_tray.preferences import Preferences, Topic
from flashd_tray.snapshot import MAKES_A_MODEL, JobView, Snapshot, State
from flashd_tray.words import Words

DIRECT_MODELS = 12  # stand in the menu itself; with a few more than these, all do
DIRECT_SLACK = 4
GROUP_MODELS = 20  # in one submenu: what fits on a small screen
RECENT_JOBS = 8
ERROR_CHARACTERS = 90

SERVING_MARK = "●"
DONE_MARK = "✓"
FAILED_MARK = "✗"


class Verb(StrEnum):
    """The meaning of a click; the subject of each is in the second column.

    SWAP, PIN, UNPIN          a model's name
    CANCEL, SHOW_ERROR        a job's number
    TOGGLE_TOPIC              a `Topic`
    the others                none
    """

    SWAP = "swap"
    CANCEL = "cancel"
    PARK = "park"
    PIN = "pin"
    UNPIN = "unpin"
    FIND = "find"
    OPEN_FOLDER = "open-folder"
    COPY_ENDPOINT = "copy-endpoint"
    CHAT = "chat"
    SHOW_ERROR = "show-error"
    DISMISS_ERRORS = "dismiss-errors"
    START = "start"
    TOGGLE_TOPIC = "toggle-topic"
    TOGGLE_AUTOSTART = "toggle-autostart"
    ABOUT = "about"
    QUIT = "quit"


@dataclass(frozen=True, slots=True)
class Action:
    verb: Verb
    subject: str = ""


class Kind(StrEnum):
    ITEM = "item"
    CHECK = "check"
    RADIO = "radio"
    SEPARATOR = "separator"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the menu. Without action and children it is only text, and cannot be clicked.

    `label` is made legible; the subject of `action` is unchanged.
    """

    key: str
    label: str = ""
    kind: Kind = Kind.ITEM
    checked: bool = False
    action: Action | None = None
    children: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", line(self.label))

    @property
    def enabled(self) -> bool:
        return self.action is not None or bool(self.children)


Menu = tuple[Entry, ...]


def tooltip(snapshot: Snapshot, _: Words) -> str:
    """Describes the active model and the use of memory in one line."""
    what = headline(snapshot, _)
    said = (what if snapshot.status is None else f"flashd: {what}", *_memory_lines(snapshot, _))
    return " · ".join(map(line, said))


def headline(snapshot: Snapshot, _: Words) -> str:
    """Returns the most important information."""
    active, job = snapshot.active, snapshot.shown_job
    match snapshot.state:
        case State.AWAY:
            return _("flashd is not running")
        case State.SWAPPING | State.CONVERTING if job is not None:
            return _job_line(job, _)
        case State.FAILED:
            return _failure_line(snapshot.failures[0], _)
    if active is not None:
        return _("{model} answers", model=active.name)
    return _("No model is active")


def describe(snapshot: Snapshot, preferences: Preferences, _: Words) -> Menu:
    """The whole menu."""
    if snapshot.status is None:
        body = _while_away(_)
    else:
        sections = (_head(snapshot, _), _models(snapshot, _), _engine(snapshot, _), _tools(snapshot, _))
        body = _separated(sections)
    return (*body, Entry("separator:end", kind=Kind.SEPARATOR), *_end(preferences, _))


def _while_away(_: Words) -> Menu:
    return (
        Entry("headline", _("flashd is not running")),
        Entry("start", _("Start flashd"), action=Action(Verb.START)),
    )


def _head(snapshot: Snapshot, _: Words) -> Menu:
    entries = [Entry("headline", headline(snapshot, _))]
    entries += [Entry(f"memory:{n}", line) for n, line in enumerate(_memory_lines(snapshot, _))]
    for job in snapshot.under_way:
        if job is not snapshot.shown_job:
            entries.append(Entry(f"job:{job.number}", _job_line(job, _)))
        label = _("Cancel: {what}", what=_job_name(job, _))
        entries.append(Entry(f"cancel:{job.number}", label, action=Action(Verb.CANCEL, str(job.number))))
    return tuple(entries)


def _memory_lines(snapshot: Snapshot, _: Words) -> list[str]:
    """Makes a line for each pool: the daemon also lists a GPU without memory of its own, which shares the host's."""
    pools = [device for device in snapshot.devices if device.kind != "unified"]
    cards = [device for device in pools if device.kind != "host"]

    def name(device: Device) -> str:
        if device.kind == "host":
            return _("Memory")
        return _("GPU") if len(cards) == 1 else device.name

    return [
        _(
            "{memory}: {used} of {budget} in use",
            memory=name(device),
            used=_.size(device.used_bytes),
            budget=_.size(device.budget_bytes),
        )
        for device in sorted(pools, key=lambda device: (device.kind == "host", device.name))
    ]


# -- models ----------------------------------------------------------------------------------------------------------


def _models(snapshot: Snapshot, _: Words) -> Menu:
    if not snapshot.models:
        return (_no_models(_),)
    ranked = most_used_first(snapshot.models)
    if len(ranked) <= DIRECT_MODELS + DIRECT_SLACK:
        return tuple(_radio(model, _) for model in ranked)
    direct = ranked[:DIRECT_MODELS]
    rest = sorted(ranked[DIRECT_MODELS:], key=lambda model: model.name.casefold())
    return (
        *(_radio(model, _) for model in direct),
        Entry(
            "more",
            _.many("{count} more model", "{count} more models", len(rest)),
            children=_grouped(rest, _),
        ),
        Entry("find", _("Find a model…"), action=Action(Verb.FIND)),
    )


def most_used_first(models: Iterable[Model]) -> list[Model]:
    """Sorts models by use, with the active one first, so that it is never in a submenu."""
    return sorted(models, key=lambda m: (not m.active, -m.use_count, -m.last_used_at, m.name.casefold()))


def _grouped(models: Sequence[Model], _: Words) -> Menu:
    """Groups models by name into submenus that fit on a screen, each labelled with its first and last."""
    if len(models) <= GROUP_MODELS:
        return tuple(_radio(model, _) for model in models)
    groups = -(-len(models) // GROUP_MODELS)
    size = -(-len(models) // groups)
    return tuple(
        Entry(
            f"group:{start // size}",
            f"{models[start].name} … {models[min(start + size, len(models)) - 1].name}",
            children=tuple(_radio(model, _) for model in models[start : start + size]),
        )
        for start in range(0, len(models), size)
    )


def instead_of_models(snapshot: Snapshot, _: Words) -> Menu:
    """Returns the entries if there are no models: the state, and the possible actions."""
    if snapshot.status is None:
        return _while_away(_)
    return () if snapshot.models else (_no_models(_), _open_folder(_))


def _no_models(_: Words) -> Entry:
    return Entry("no-models", _("No models yet: copy one into the models folder"))


def _radio(model: Model, _: Words) -> Entry:
    return Entry(
        f"model:{model.name}",
        model_label(model, _),
        kind=Kind.RADIO,
        checked=model.active,
        action=Action(Verb.SWAP, model.name),
    )


def model_label(model: Model, _: Words) -> str:
    """Returns the name, size and tier of a model."""
    return line(f"{model.name} · {model_details(model, _)}")


def model_details(model: Model, _: Words) -> str:
    """Returns the size and tier of a model."""
    tiers = {"device": _("in GPU"), "host": _("warm"), "stored": _("on disk")}
    parts = [_.size(model.size_bytes), tiers.get(model.residency, model.residency)]
    if model.pinned:
        parts.append(_("pinned"))
    return line(" · ".join(parts))


def _engine(snapshot: Snapshot, _: Words) -> Menu:
    active = snapshot.active
    entries = []
    if active is not None:
        entries.append(Entry("park", _("Park {model}", model=active.name), action=Action(Verb.PARK)))
    kept = [m for m in sorted(snapshot.models, key=lambda m: m.name.casefold()) if m.pinned or m.residency != "stored"]
    if kept:
        pins = tuple(
            Entry(
                f"pin:{model.name}",
                model.name,
                kind=Kind.CHECK,
                checked=model.pinned,
                action=Action(Verb.UNPIN if model.pinned else Verb.PIN, model.name),
            )
            for model in kept[:GROUP_MODELS]
        )
        entries.append(Entry("pins", _("Keep in memory"), children=pins))
    return tuple(entries)


# -- tools -----------------------------------------------------------------------------------------------------------


def _tools(snapshot: Snapshot, _: Words) -> Menu:
    recent = _recent(snapshot, _)
    serving = snapshot.active is not None
    return (
        Entry("chat", _("Chat…"), action=Action(Verb.CHAT) if serving else None),
        Entry("copy-endpoint", _("Copy endpoint"), action=Action(Verb.COPY_ENDPOINT) if serving else None),
        _open_folder(_),
        *((Entry("recent", _("Recent"), children=recent),) if recent else ()),
    )


def _open_folder(_: Words) -> Entry:
    return Entry("open-folder", _("Open models folder"), action=Action(Verb.OPEN_FOLDER))


def _recent(snapshot: Snapshot, _: Words) -> Menu:
    jobs = [job for job in snapshot.jobs if job.finished and (job.kind in MAKES_A_MODEL or job.failed)]
    jobs.sort(key=lambda job: job.finished_at, reverse=True)
    entries = [_ended(job, _) for job in jobs[:RECENT_JOBS]]
    waiting = [item for item in (snapshot.status.inbox_items if snapshot.status else ()) if item.state == "incomplete"]
    entries += [
        Entry(f"inbox:{item.name}", _("{model} is incomplete: {why}", model=item.name, why=_short(item.detail)))
        for item in waiting[:RECENT_JOBS]
    ]
    if snapshot.failures:
        entries.append(Entry("dismiss", _("Mark errors as seen"), action=Action(Verb.DISMISS_ERRORS)))
    return tuple(entries)


def _ended(job: JobView, _: Words) -> Entry:
    if job.failed:
        label = f"{FAILED_MARK} {_failure_line(job, _)}"
        return Entry(f"ended:{job.number}", label, action=Action(Verb.SHOW_ERROR, str(job.number)))
    seconds = _.duration(job.finished_at - job.created_at)
    if job.state == "cancelled" or job.error_name == Cancelled.bus_name():
        return Entry(f"ended:{job.number}", _("{what}: cancelled", what=_job_name(job, _)))
    return Entry(
        f"ended:{job.number}",
        f"{DONE_MARK} " + _("{model} is ready, after {seconds}", model=job.subject, seconds=seconds),
        action=Action(Verb.SWAP, job.subject),
    )


def _end(preferences: Preferences, _: Words) -> Menu:
    topics = {
        Topic.READY: _("A new model is ready"),
        Topic.FAILED: _("A conversion or swap failed"),
        Topic.SWAPPED: _("A long swap has finished"),
        Topic.REFUSED: _("Memory is insufficient"),
    }
    return (
        Entry(
            "topics",
            _("Notifications"),
            children=tuple(
                Entry(
                    f"topic:{topic}",
                    label,
                    kind=Kind.CHECK,
                    checked=topic in preferences.topics,
                    action=Action(Verb.TOGGLE_TOPIC, topic),
                )
                for topic, label in topics.items()
            ),
        ),
        Entry(
            "autostart",
            _("Start at login"),
            kind=Kind.CHECK,
            checked=preferences.autostart,
            action=Action(Verb.TOGGLE_AUTOSTART),
        ),
        Entry("about", _("About flashd"), action=Action(Verb.ABOUT)),
        Entry("quit", _("Quit"), action=Action(Verb.QUIT)),
    )


# -- sentences -------------------------------------------------------------------------------------------------------


def explain(error_name: str, message: str, hint: str, _: Words) -> str:
    """Formats an error for the text below its title: what happened, and the remedy."""
    if error_name == OutOfMemory.bus_name():
        message = _("It does not fit into memory: {why}", why=message)
    return f"{message}\n{hint}" if hint else message


def _job_name(job: JobView, _: Words) -> str:
    names = {
        "swap": _("Swapping to {model}", model=job.subject),
        "serve": _("Swapping to {model}", model=job.subject),
        "load": _("Loading {model}", model=job.subject),
        "park": _("Parking {model}", model=job.subject),
        "import": _("Converting {model}", model=job.subject),
        "pull": _("Downloading {model}", model=job.subject),
        "verify": _("Verifying {model}", model=job.subject),
        "scrub": _("Checking the store"),
        "install": _("Installing {model}", model=job.subject),
        "warm-up": _("Getting {model} ready", model=job.subject),
    }
    return names.get(job.kind, f"{job.kind} {job.subject}")


def _job_line(job: JobView, _: Words) -> str:
    name = _job_name(job, _)
    if job.state in {"queued", "collecting"}:
        return _("{what}: waiting", what=name)
    if job.progress is not None:
        return _("{what}: {percent} %", what=name, percent=int(100 * job.progress))
    return name


def _failure_line(job: JobView, _: Words) -> str:
    why = _short(job.error_message)
    return _("{what} failed: {why}", what=_job_name(job, _), why=why)


def _short(text: str) -> str:
    """Returns the first line, shortened for a menu."""
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= ERROR_CHARACTERS else line[: ERROR_CHARACTERS - 1].rstrip() + "…"


def _separated(sections: Iterable[Menu]) -> Menu:
    """Joins the sections that are not empty, with separators between them."""
    entries: list[Entry] = []
    for number, section in enumerate(filter(None, sections)):
        if number:
            entries.append(Entry(f"separator:{number}", kind=Kind.SEPARATOR))
        entries += section
    return tuple(entries)
