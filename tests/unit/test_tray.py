# SPDX-License-Identifier: Apache-2.0
"""The tray in every state of the daemon: menu, tooltip, icon, notices and preferences, without a desktop."""

from __future__ import annotations

import dataclasses
import gettext
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from flashd_tray import menu, programs, windows
from flashd_tray.actions import name_for
from flashd_tray.icon import COLOURS, SIZES, Theme, draw
from flashd_tray.menu import DIRECT_MODELS, GROUP_MODELS, Action, Entry, Kind, Verb
from flashd_tray.notices import LONG_SWAP_S, Notices
from flashd_tray.plain import LINE_CHARACTERS, markup, paragraph
from flashd_tray.preferences import Preferences, PreferencesFile, Topic
from flashd_tray.snapshot import JobView, Snapshot, State
from flashd_tray.words import CATALOGS, Words
from hypothesis import given
from hypothesis import strategies as st

from flashd.client.results import Device, InboxItem, Model, Status
from flashd.errors import Cancelled, EngineFailed, InvalidSource, NotAuthorized, NotFound, OutOfMemory, StoreFull

ENGLISH = Words(["en"])
GB = 10**9
INTERFACES = Path(__file__).parents[2] / "flashd" / "dbus" / "interfaces"
TRANSLATIONS = Path(__file__).parents[2] / "tray" / "translations"
COMPILE = TRANSLATIONS.with_name("compile_catalog.py")


def status(active: str = "", *, items: tuple[InboxItem, ...] = ()) -> Status:
    return Status("1.0", "ready", active, "/run/flashd/openai.sock", ("/home/eve/models",), "/store", 0, 0, 0, items)


def model(name: str = "ada", **changes: object) -> Model:
    made = Model(
        name=name, aliases=(), checkpoint="", architecture="Qwen3ForCausalLM", dtype="BF16", size_bytes=16_400_000_000,
        tensor_count=1, residency="stored", devices=(), active=False, pinned=False, leases=0, created_at=0,
        last_used_at=0, use_count=0, source="", path=f"/org/flashd1/model/{name}",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


_numbers = itertools.count(1)


def job(kind: str = "swap", subject: str = "bob", state: str = "running", **changes: object) -> JobView:
    made = JobView(
        number=next(_numbers), kind=kind, subject=subject, state=state, phase="", done_bytes=0, total_bytes=0,
        created_at=100.0, finished_at=0.0, result={}, error_name="", error_message="", error_hint="",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def failed(kind: str = "import", subject: str = "carl", error: type = InvalidSource, **changes: object) -> JobView:
    given = {"error_name": error.bus_name(), "error_message": "config.json is missing", "error_hint": "add it"}
    return job(kind, subject, "failed", **({"finished_at": 101.0} | given | changes))


DEVICE = Device(
    name="host", kind="host", model="", uuid="", total_bytes=128 * GB, budget_bytes=100 * GB, used_bytes=33 * GB,
    leased_bytes=0, driver_used_bytes=0, huge_pages="shmem", integrated=False, reads_host_pages=True, maps_memory=False,
    exports_memory=True, path="/org/flashd1/device/host",
)  # fmt: skip


def snapshot(*models: Model, jobs: tuple[JobView, ...] = (), items: tuple[InboxItem, ...] = ()) -> Snapshot:
    active = next((m.name for m in models if m.active), "")
    return Snapshot(status(active, items=items), models, (DEVICE,), jobs)


def described(shown: Snapshot, preferences: Preferences | None = None) -> dict[str, Entry]:
    entries = menu.describe(shown, preferences or Preferences(), ENGLISH)
    flat = list(everything(entries))
    assert len({entry.key for entry in flat}) == len(flat), "keys must tell entries apart"
    return {entry.key: entry for entry in flat}


def everything(entries: tuple[Entry, ...]) -> list[Entry]:
    return [found for entry in entries for found in (entry, *everything(entry.children))]


def labels(shown: Snapshot) -> list[str]:
    return [entry.label for entry in described(shown).values() if entry.kind is not Kind.SEPARATOR]


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "state", "tooltip"),
    [
        (Snapshot(), State.AWAY, "flashd is not running"),
        (snapshot(), State.IDLE, "flashd: No model is active · Memory: 33 GB of 100 GB in use"),
        (
            snapshot(model(active=True)),
            State.SERVING,
            "flashd: ada answers · Memory: 33 GB of 100 GB in use",
        ),
        (
            snapshot(model(active=True), jobs=(job(done_bytes=40, total_bytes=100),)),
            State.SWAPPING,
            "flashd: Swapping to bob: 40 % · Memory: 33 GB of 100 GB in use",
        ),
        (
            snapshot(model(active=True), jobs=(job("import", "carl", "queued"),)),
            State.CONVERTING,
            "flashd: Converting carl: waiting · Memory: 33 GB of 100 GB in use",
        ),
        (
            snapshot(model(active=True), jobs=(failed(),)),
            State.FAILED,
            "flashd: Converting carl failed: config.json is missing · Memory: 33 GB of 100 GB in use",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, State) else "",
)
def test_every_state_and_its_tooltip(shown: Snapshot, state: State, tooltip: str) -> None:
    assert shown.state is state
    assert menu.tooltip(shown, ENGLISH) == tooltip


def test_what_is_under_way_comes_before_what_failed() -> None:
    swap, conversion = job(), job("import", "carl")
    assert snapshot(jobs=(failed(), conversion, swap)).shown_job is swap
    assert snapshot(jobs=(failed(), conversion)).shown_job is conversion
    assert snapshot(jobs=(failed(),)).shown_job is None


def test_the_running_job_is_shown_and_not_the_one_that_waits() -> None:
    waiting, running = job(state="queued"), job("swap", "carl")
    assert snapshot(jobs=(waiting, running)).shown_job is running


def test_a_failure_is_over_when_seen_or_mended() -> None:
    bad = failed()
    assert snapshot(jobs=(bad,)).failures == (bad,)
    assert dataclasses.replace(snapshot(jobs=(bad,)), dismissed=frozenset({bad.number})).state is State.IDLE
    assert snapshot(jobs=(bad, job("import", "carl", "done"))).failures == ()
    assert snapshot(jobs=(job("import", "carl", "done"), again := failed())).failures == (again,)
    assert snapshot(jobs=(bad, job("swap", "carl", "done"))).failures == (bad,)


def test_what_somebody_cancelled_did_not_fail() -> None:
    assert snapshot(jobs=(job(state="cancelled", finished_at=1.0), failed(error=Cancelled))).state is State.IDLE


def test_progress_is_known_or_not() -> None:
    assert job().progress is None
    assert job(done_bytes=1, total_bytes=4).progress == 0.25
    assert job(done_bytes=5, total_bytes=4).progress == 1.0
    assert job(state="done", done_bytes=4, total_bytes=4).progress is None


# -- menu ------------------------------------------------------------------------------------------------------------


def test_away_offers_to_start_and_nothing_that_needs_a_daemon() -> None:
    keys = set(described(Snapshot()))
    assert {"headline", "start", "autostart", "about", "quit"} <= keys
    assert not keys & {"chat", "park", "open-folder", "copy-endpoint", "recent"}


def test_models_are_radio_items_with_size_and_tier() -> None:
    shown = snapshot(
        model("ada", active=True, residency="host"),
        model("bob", residency="device", pinned=True, size_bytes=950),
        model("carl"),
    )
    entries = described(shown)
    assert [entries[f"model:{n}"].label for n in ("ada", "bob", "carl")] == [
        "ada · 16.4 GB · warm",
        "bob · 950 B · in GPU · pinned",
        "carl · 16.4 GB · on disk",
    ]
    assert [entries[f"model:{n}"].checked for n in ("ada", "bob", "carl")] == [True, False, False]
    assert all(entries[f"model:{n}"].kind is Kind.RADIO for n in ("ada", "bob", "carl"))
    assert entries["model:bob"].action == Action(Verb.SWAP, "bob")


def test_the_most_used_stand_first_and_the_active_one_before_them() -> None:
    models = [
        model("a"), model("c", use_count=5), model("b", use_count=5, last_used_at=9),
        model("B", use_count=0), model("z", active=True),
    ]  # fmt: skip
    assert [m.name for m in menu.most_used_first(models)] == ["z", "b", "c", "a", "B"]


@given(count=st.integers(0, 250), active=st.integers(0, 249))
def test_any_number_of_models_fits_on_a_screen(count: int, active: int) -> None:
    models = [model(f"m{n:03}", use_count=n % 7, active=n == active) for n in range(count)]
    entries = menu.describe(snapshot(*models), Preferences(), ENGLISH)
    radios = [entry for entry in everything(entries) if entry.kind is Kind.RADIO]
    assert sorted(entry.key for entry in radios) == [f"model:m{n:03}" for n in range(count)]
    assert len(entries) < 40
    assert all(len(entry.children) <= GROUP_MODELS for entry in everything(entries))
    if active < count:
        assert [entry for entry in entries if entry.kind is Kind.RADIO and entry.checked]


def test_a_hundred_models_are_grouped_and_can_be_searched() -> None:
    models = [model(f"m{n:03}", use_count=100 - n) for n in range(100)]
    entries = described(snapshot(*models))
    assert entries["more"].label == "88 more models"
    assert [child.label for child in entries["more"].children] == [
        "m012 … m029", "m030 … m047", "m048 … m065", "m066 … m083", "m084 … m099",
    ]  # fmt: skip
    assert entries["find"].action == Action(Verb.FIND)
    assert "find" not in described(snapshot(*models[:DIRECT_MODELS]))


def test_where_no_models_are_it_says_why_and_what_to_do() -> None:
    def said(shown: Snapshot) -> list[tuple[str, Verb | None]]:
        return [(e.label, e.action.verb if e.action else None) for e in menu.instead_of_models(shown, ENGLISH)]

    assert said(Snapshot()) == [("flashd is not running", None), ("Start flashd", Verb.START)]
    assert said(snapshot()) == [
        ("No models yet: copy one into the models folder", None),
        ("Open models folder", Verb.OPEN_FOLDER),
    ]
    assert said(snapshot(model())) == []


def test_no_models_says_what_to_do() -> None:
    assert "No models yet: copy one into the models folder" in labels(snapshot())


def test_jobs_under_way_can_be_cancelled() -> None:
    swap, conversion = job(done_bytes=1, total_bytes=2), job("import", "carl", "queued")
    entries = described(snapshot(jobs=(conversion, swap)))
    assert entries["headline"].label == "Swapping to bob: 50 %"
    assert entries[f"job:{conversion.number}"].label == "Converting carl: waiting"
    assert entries[f"cancel:{swap.number}"] == Entry(
        f"cancel:{swap.number}", "Cancel: Swapping to bob", action=Action(Verb.CANCEL, str(swap.number))
    )


def test_every_kind_of_job_has_a_name() -> None:
    interface = (INTERFACES / "org.flashd1.Job.xml").read_text()
    (said,) = re.findall(r'<property name="Kind".*?value="(.*?)\.', interface, re.DOTALL)
    kinds = re.split(r", or |, | or ", said)
    assert {"import", "swap", "warm-up"} <= set(kinds)
    for kind in kinds:
        assert f"Cancel: {kind} bob" not in labels(snapshot(jobs=(job(kind),))), kind
    assert "Cancel: of-tomorrow bob" in labels(snapshot(jobs=(job("of-tomorrow"),)))


def test_what_is_made_ready_by_itself_leaves_the_icon_as_it_is() -> None:
    shown = snapshot(model("ada", active=True), jobs=(job("warm-up"),))
    assert shown.state is State.SERVING
    assert "Cancel: Getting bob ready" in labels(shown)


def test_parking_chat_and_endpoint_need_an_active_model() -> None:
    idle, serving = described(snapshot(model())), described(snapshot(model(active=True)))
    assert "park" not in idle
    assert not idle["chat"].enabled and not idle["copy-endpoint"].enabled
    assert serving["park"].label == "Park ada"
    assert serving["chat"].enabled and serving["copy-endpoint"].enabled


def test_memory_is_shown_pool_by_pool() -> None:
    card = dataclasses.replace(DEVICE, name="cuda:0", kind="cuda", budget_bytes=80 * GB, used_bytes=16 * GB)
    second = dataclasses.replace(card, name="cuda:1")
    unified = dataclasses.replace(DEVICE, name="cuda:0", kind="unified")

    def lines(*devices: Device) -> list[str]:
        shown = dataclasses.replace(snapshot(), devices=devices)
        return [entry.label for key, entry in described(shown).items() if key.startswith("memory:")]

    host = "Memory: 33 GB of 100 GB in use"
    assert lines(DEVICE, card) == ["GPU: 16 GB of 80 GB in use", host]
    assert lines(DEVICE, card, second) == ["cuda:0: 16 GB of 80 GB in use", "cuda:1: 16 GB of 80 GB in use", host]
    assert lines(DEVICE, unified) == [host]


def test_what_is_in_memory_or_pinned_can_be_pinned_or_let_go() -> None:
    entries = described(snapshot(model("ada", residency="host"), model("bob", pinned=True), model("carl")))
    assert (entries["pin:ada"].checked, entries["pin:ada"].action) == (False, Action(Verb.PIN, "ada"))
    assert (entries["pin:bob"].checked, entries["pin:bob"].action) == (True, Action(Verb.UNPIN, "bob"))
    assert "pin:carl" not in entries
    assert "pins" not in described(snapshot(model("carl")))


def test_recent_conversions_and_why_they_failed() -> None:
    good, bad = job("import", "bob", "done", finished_at=101.2), failed(error_message="no\ndetails " + "x" * 200)
    dropped = job("import", "dora", "cancelled", finished_at=99.0)
    items = (InboxItem("emil", "incomplete", "shard 2 of 3 is missing"), InboxItem("fritz", "settling", ""))
    entries = described(snapshot(jobs=(good, bad, dropped), items=items))
    assert [child.label for child in entries["recent"].children] == [
        "✓ bob is ready, after 1.20 s",
        "✗ Converting carl failed: no",
        "Converting dora: cancelled",
        "emil is incomplete: shard 2 of 3 is missing",
        "Mark errors as seen",
    ]
    assert entries[f"ended:{bad.number}"].action == Action(Verb.SHOW_ERROR, str(bad.number))
    assert "recent" not in described(snapshot())


def test_long_errors_are_cut_for_the_menu() -> None:
    assert all(len(label) < 160 for label in labels(snapshot(jobs=(failed(error_message="x" * 500),))))


HOSTILE = "my_<b>model</b> & co\nQuit\x1b[2J\u202efdp\u2066\u200b\x00\udcff"
HOSTILE_SHOWN = r"my_<b>model</b> & co Quit\x1b[2J\u202efdp\u2066\u200b\x00\xff"


@pytest.mark.parametrize("text", [HOSTILE, "\u202e" * 10_000, "ada" * 10_000])
def test_text_from_outside_is_legible_and_short_wherever_the_menu_shows_it(text: str) -> None:
    named = [model(text, active=True, residency="host", architecture=text), *(model(f"{text}{n}") for n in range(40))]
    ended = [failed("import", text, error_message=text), job(text, text), job("pull", text, "done", finished_at=1.0)]
    card = dataclasses.replace(DEVICE, name=text, kind="cuda")
    item = InboxItem(text, "incomplete", text)
    shown = dataclasses.replace(snapshot(*named, jobs=tuple(ended), items=(item,)), devices=(DEVICE, card, card))
    says = [*labels(shown), *menu.tooltip(shown, ENGLISH).split(" · "), menu.model_label(named[0], ENGLISH)]
    assert len(says) > 50 and all(said.isprintable() and len(said) <= LINE_CHARACTERS for said in says)
    assert Action(Verb.SWAP, text) in {entry.action for entry in described(shown).values()}, "what it does is unchanged"
    if text is HOSTILE:
        assert f"Park {HOSTILE_SHOWN}" in says and f"{HOSTILE_SHOWN} · 16.4 GB · warm" in says


@pytest.mark.parametrize("text", [HOSTILE, "x" * 1_000_000])
def test_windows_show_text_from_outside_legibly(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gtk, copied = MagicMock(), MagicMock()
    monkeypatch.setattr(windows, "gtk", lambda: gtk)
    monkeypatch.setattr(windows, "copy", copied)
    windows.show_error(text, f"{text}\nask root", ENGLISH)
    windows.Finder(lambda _action: None, ENGLISH)._row(model(text, architecture=text))
    said = [word for call in gtk.mock_calls for word in (*call.args, *call.kwargs.values()) if isinstance(word, str)]
    assert len(said) > 5 and all("".join(word.split("\n")).isprintable() and len(word) < 3000 for word in said)
    (_, respond), _ = gtk.MessageDialog().connect.call_args
    respond(None, gtk.ResponseType.APPLY)
    assert copied.call_args.args[0].replace("\n", "").isprintable()


def test_no_text_from_outside_is_markup_or_more_than_a_window_holds() -> None:
    assert markup("<b>bold</b> & co\nnext") == "&lt;b&gt;bold&lt;/b&gt; &amp; co\nnext"
    assert markup("\x1b<i>") == r"\x1b&lt;i&gt;"
    assert len(paragraph("x\n" * 100_000)) <= 1000


def test_separators_never_begin_or_end_or_double() -> None:
    for shown in (Snapshot(), snapshot(), snapshot(model(active=True), jobs=(job(), failed()))):
        kinds = [entry.kind for entry in menu.describe(shown, Preferences(), ENGLISH)]
        assert kinds[0] is not Kind.SEPARATOR and kinds[-1] is not Kind.SEPARATOR
        assert not any(a is b is Kind.SEPARATOR for a, b in itertools.pairwise(kinds))


def test_keys_stay_while_only_progress_moves() -> None:
    swap = job(done_bytes=1, total_bytes=10)
    first = described(snapshot(model("bob"), jobs=(swap,)))
    later = described(snapshot(model("bob"), jobs=(dataclasses.replace(swap, done_bytes=9),)))
    assert list(first) == list(later)
    assert first["headline"] != later["headline"]


def test_preferences_are_shown() -> None:
    entries = described(Snapshot(), Preferences(frozenset({Topic.FAILED}), autostart=True))
    assert [entries[f"topic:{topic}"].checked for topic in Topic] == [False, True, False, False]
    assert entries["autostart"].checked


def test_denials_and_refusals_are_explained() -> None:
    assert menu.explain(NotAuthorized.bus_name(), "no right", "ask root", ENGLISH) == "no right\nask root"
    assert menu.explain(OutOfMemory.bus_name(), "8 GB short", "", ENGLISH) == "It does not fit into memory: 8 GB short"
    assert menu.explain(EngineFailed.bus_name(), "it died", "", ENGLISH) == "it died"


# -- notices ---------------------------------------------------------------------------------------------------------


def told(*snapshots: Snapshot, preferences: Preferences | None = None) -> list[str]:
    notices = Notices(ENGLISH, clock=lambda: 500.0)
    found = [notice for shown in snapshots for notice in notices.of(shown, preferences or Preferences())]
    return [f"{notice.title}: {notice.body}" for notice in found]


def ends(before: JobView, **changes: object) -> tuple[Snapshot, Snapshot]:
    return snapshot(jobs=(before,)), snapshot(model("carl"), jobs=(dataclasses.replace(before, **changes),))


def test_a_model_is_announced_when_it_is_listed() -> None:
    notices = Notices(ENGLISH, clock=lambda: 101.0)
    running = job("import", "carl", created_at=98.5)
    done = dataclasses.replace(running, state="done", finished_at=100.0)
    assert notices.of(snapshot(jobs=(running,)), Preferences()) == []
    assert notices.of(snapshot(jobs=(done,)), Preferences()) == []
    (notice,) = notices.of(snapshot(model("carl"), jobs=(done,)), Preferences())
    assert notice.body == "16.4 GB. Converted in 1.50 s."
    assert notices.of(snapshot(model("carl"), jobs=(done,)), Preferences()) == []


def test_a_dropped_model_that_is_ready_can_be_switched_to() -> None:
    notices = Notices(ENGLISH)
    before, after = ends(job("import", "carl"), state="done", finished_at=101.5)
    assert notices.of(before, Preferences()) == []
    (notice,) = notices.of(after, Preferences())
    assert (notice.title, notice.body) == ("carl is ready", "16.4 GB. Converted in 1.50 s.")
    assert (notice.action, notice.action_label) == (Action(Verb.SWAP, "carl"), "Switch")
    assert notices.of(after, Preferences()) == []


def test_models_dropped_together_make_one_notice() -> None:
    jobs = [job("import", f"m{n}", "done", finished_at=100.0 + n) for n in range(5)]
    steps = [snapshot(jobs=tuple(jobs[:n])) for n in range(6)]
    assert told(*steps)[-1] == "5 new models are ready: m2, m3, m4 …"
    assert told(steps[0], steps[-1]) == ["5 new models are ready: m2, m3, m4 …"]
    late = job("import", "late", "done", finished_at=1000.0)
    assert told(steps[4], steps[5], snapshot(jobs=(*jobs, late)))[-1].startswith("late is ready")


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (failed(), "carl could not be converted: config.json is missing\nadd it"),
        (failed("swap", error=EngineFailed), "No swap to carl: config.json is missing\nadd it"),
        (
            failed("load", error=OutOfMemory),
            "carl could not be loaded: It does not fit into memory: config.json is missing\nadd it",
        ),
        (failed("scrub", ""), "Something failed in flashd: config.json is missing\nadd it"),
        (
            failed("swap", error=NotAuthorized),
            "Not permitted: config.json is missing\nadd it",
        ),
    ],
)
def test_failures_are_told_with_their_reason(ended: JobView, said: str) -> None:
    assert told(snapshot(), snapshot(jobs=(ended,))) == [said]


def test_only_a_long_swap_is_told() -> None:
    quick = job(state="done", finished_at=100.0 + LONG_SWAP_S - 0.1)
    long = job(state="done", finished_at=107.0)
    assert told(snapshot(), snapshot(jobs=(quick,))) == []
    assert told(snapshot(), snapshot(jobs=(long,))) == ["bob answers: The swap took 7.00 s."]


def test_old_news_and_cancellations_are_not_told() -> None:
    old = job("import", "carl", "done", finished_at=1.0)
    assert told(Snapshot(), snapshot(jobs=(old,))) == []
    assert told(snapshot(), Snapshot(), snapshot(jobs=(old, failed()))) == []
    assert told(snapshot(), snapshot(jobs=(job(state="cancelled", finished_at=1.0),))) == []


def test_what_ended_while_nobody_was_seen_is_told_late() -> None:
    now = 1000.0
    notices = Notices(ENGLISH, clock=lambda: now)
    assert notices.of(snapshot(jobs=(failed(finished_at=999.0),)), Preferences()) == []
    now = 1010.0
    notices.of(snapshot(), Preferences())
    notices.of(Snapshot(), Preferences())
    now = 1100.0
    (notice,) = notices.of(snapshot(jobs=(failed(finished_at=1009.0), failed(finished_at=1050.0))), Preferences())
    assert notice.title == "carl could not be converted"


@pytest.mark.parametrize("topic", list(Topic))
def test_each_topic_can_be_switched_off(topic: Topic) -> None:
    examples = {
        Topic.READY: job("import", "carl", "done", finished_at=101.0),
        Topic.FAILED: failed(),
        Topic.SWAPPED: job(state="done", finished_at=200.0),
        Topic.REFUSED: failed("swap", error=StoreFull),
    }
    after = snapshot(jobs=(examples[topic],))
    assert len(told(snapshot(), after)) == 1
    assert told(snapshot(), after, preferences=Preferences(frozenset(Topic) - {topic})) == []


# -- preferences -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> PreferencesFile:
    return PreferencesFile(tmp_path / "config", [tmp_path / "xdg"], ["/opt/a b/flashd-tray"])


def test_topics_are_kept(kept: PreferencesFile, tmp_path: Path) -> None:
    assert kept.read() == Preferences()
    assert kept.toggle(Topic.READY).topics == frozenset(Topic) - {Topic.READY}
    assert kept.read().topics == frozenset(Topic) - {Topic.READY}
    file = tmp_path / "config" / "flashd" / "tray.toml"
    file.write_text("other = 1\n" + file.read_text())
    assert kept.toggle(Topic.READY).topics == frozenset(Topic)
    assert "other = 1" in file.read_text()


@pytest.mark.parametrize("text", ["not TOML", "notifications = 3", "[notifications]\nready = true\nfuture = 1"])
def test_a_spoiled_file_counts_as_none(kept: PreferencesFile, tmp_path: Path, text: str) -> None:
    (tmp_path / "config" / "flashd").mkdir(parents=True)
    (tmp_path / "config" / "flashd" / "tray.toml").write_text(text)
    assert kept.read().topics == frozenset(Topic)


def test_autostart_is_an_entry_of_the_desktop(kept: PreferencesFile, tmp_path: Path) -> None:
    entry = tmp_path / "config" / "autostart" / "flashd-tray.desktop"
    assert kept.toggle_autostart().autostart
    assert 'Exec="/opt/a b/flashd-tray"\n' in entry.read_text()
    assert not kept.toggle_autostart().autostart
    assert not entry.exists()


def test_the_machines_autostart_can_be_switched_off(kept: PreferencesFile, tmp_path: Path) -> None:
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "flashd-tray.desktop").write_text("[Desktop Entry]\nExec=flashd-tray\n")
    assert kept.read().autostart
    assert not kept.toggle_autostart().autostart
    assert kept.toggle_autostart().autostart
    entry = tmp_path / "config" / "autostart" / "flashd-tray.desktop"
    entry.write_text("[Desktop Entry]\nX-GNOME-Autostart-enabled=false\n")  # as GNOME's settings do
    assert not kept.read().autostart


# -- icon ------------------------------------------------------------------------------------------------------------


def luminance(colour: tuple[int, ...]) -> float:
    """WCAG 2.1, relative luminance."""
    parts = [c / 255 for c in colour[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("panel", [(0xF6, 0xF5, 0xF4), (0xFF, 0xFF, 0xFF), (0x2D, 0x2D, 0x2D), (0, 0, 0)], ids=str)
def test_the_icon_is_seen_on_light_and_dark_panels(state: State, panel: tuple[int, ...]) -> None:
    light, dark = sorted((luminance(COLOURS[state]), luminance(panel)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3.0


@pytest.mark.parametrize("size", SIZES)
def test_states_differ_by_shape_and_not_only_by_colour(size: int) -> None:
    shapes = {state: draw(state, size=size).getchannel("A").tobytes() for state in State}
    shapes[State.CONVERTING] += b"its colour tells it from swapping, and the words do"
    assert len(set(shapes.values())) == len(State)


@pytest.mark.parametrize("size", SIZES)
def test_the_icon_fills_its_square(size: int) -> None:
    for state in State:
        left, top, right, bottom = draw(state, size=size).getbbox()
        assert bottom - top >= 0.85 * size, state
        assert right - left >= 0.5 * size, state


@pytest.mark.parametrize("size", SIZES)
def test_level_edges_are_sharp_at_every_size(size: int) -> None:
    """Those of the bolt's two wings, and of the ring where it touches the square: full or clear."""

    def column(state: State, x: float) -> list[int]:
        alpha = draw(state, 1.0, size).getchannel("A")
        return [alpha.getpixel((int(x * size), y)) for y in range(size)]

    upwards, downwards = column(State.SERVING, 0.3)[::-1], column(State.SERVING, 0.7)
    assert next(filter(None, upwards)) == next(filter(None, downwards)) == 255
    assert column(State.SWAPPING, 0.5)[0] == column(State.SWAPPING, 0.5)[-1] == 255


def test_a_theme_writes_each_icon_once(tmp_path: Path) -> None:
    theme = Theme(tmp_path)
    name = theme.icon(State.SWAPPING, 0.42)
    assert name == "flashd-tray-swapping-4"
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == len(SIZES) + 1
    written = [file.stat().st_mtime_ns for file in files]
    assert theme.icon(State.SWAPPING, 0.38) == name
    assert [file.stat().st_mtime_ns for file in files] == written


# -- words -----------------------------------------------------------------------------------------------------------


def test_catalogs_are_complete() -> None:
    if shutil.which("msgfmt") is None:
        pytest.skip("needs gettext")
    checked = subprocess.run([TRANSLATIONS, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def catalog(path: Path) -> dict[object, str]:
    with path.open("rb") as file:
        read = gettext.GNUTranslations(file)
    return {key: said for key, said in vars(read)["_catalog"].items() if key}  # less the head, which has dates


@pytest.mark.parametrize("po", sorted(CATALOGS.glob("*/LC_MESSAGES/*.po")), ids=lambda po: po.parent.parent.name)
def test_the_build_compiles_catalogs_as_gettext_does(po: Path, tmp_path: Path) -> None:
    if shutil.which("msgfmt") is None:
        pytest.skip("needs gettext")
    subprocess.run(["msgfmt", "-o", tmp_path / "theirs.mo", po], check=True)
    subprocess.run([sys.executable, COMPILE, po, tmp_path / "ours.mo"], check=True)
    assert catalog(tmp_path / "ours.mo") == catalog(tmp_path / "theirs.mo")
    assert catalog(po.with_suffix(".mo")) == catalog(tmp_path / "ours.mo"), "build it: packaging/environment"


def test_a_catalog_that_is_not_understood_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "odd.po").write_text('msgctxt "menu"\nmsgid "Open"\nmsgstr "Offen"\n')
    command = [sys.executable, COMPILE, tmp_path / "odd.po", tmp_path / "odd.mo"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 1 and "is not a line of a catalog" in built.stderr
    assert not (tmp_path / "odd.mo").exists()


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("de", ["Wechsel zu bob: 50 %", "Arbeitsspeicher: 33 GB von 100 GB belegt", "Abbrechen: Wechsel zu bob"]),
        ("zh_CN", ["切换到 bob：50%", "内存：已用 33 GB，共 100 GB", "取消：切换到 bob"]),
        ("xx", ["Swapping to bob: 50 %", "Memory: 33 GB of 100 GB in use", "Cancel: Swapping to bob"]),
    ],
)
def test_the_menu_speaks_the_language_of_the_desktop(language: str, said: list[str]) -> None:
    shown = snapshot(model(), jobs=(job(done_bytes=1, total_bytes=2),))
    assert [entry.label for entry in menu.describe(shown, Preferences(), Words([language]))[:3]] == said


def test_numbers_and_plurals_follow_the_language() -> None:
    german, chinese = Words(["de"]), Words(["zh_CN"])
    assert german.size(16_400_000_000) == "16,4 GB"
    assert german.duration(1.25) == "1,25 s"
    assert chinese.size(16_400_000_000) == "16.4 GB"
    more = ("{count} more model", "{count} more models")
    assert [german.many(*more, n) for n in (1, 2)] == ["1 weiteres Modell", "2 weitere Modelle"]
    assert [chinese.many(*more, n) for n in (1, 2)] == ["还有 1 个模型", "还有 2 个模型"]


@pytest.mark.parametrize("language", ["de", "zh_CN"])
def test_names_with_braces_stay_as_they_are(language: str) -> None:
    for name in ("{model}", "{0}", "100 %", "ä{"):
        entries = menu.describe(snapshot(model(name, active=True)), Preferences(), Words([language]))
        assert any(name in entry.label for entry in everything(entries))


# -- programs and paths ----------------------------------------------------------------------------------------------


def test_a_terminal_is_the_desktops_choice_first() -> None:
    installed = {"xterm": "/usr/bin/xterm", "konsole": "/usr/bin/konsole"}
    assert programs.in_terminal(["flash", "run", "a b"], installed.get) == [
        "/usr/bin/konsole",
        "-e",
        "flash",
        "run",
        "a b",
    ]
    installed["xdg-terminal-exec"] = "/bin/xdg-terminal-exec"
    assert programs.in_terminal(["flash"], installed.get) == ["/bin/xdg-terminal-exec", "flash"]
    with pytest.raises(NotFound, match="there is no terminal program") as caught:
        programs.in_terminal(["flash", "run", "ada"], {}.get)
    assert "flash run ada" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "name"),
    [("my model", "my model"), ("Q.v1/model.safetensors", "Q.v1"), ("Q/tuned-Q4.gguf", "tuned-Q4"), ("v1.5", "v1.5")],
)
def test_what_is_opened_gets_the_name_the_inbox_would_give(tmp_path: Path, path: str, name: str) -> None:
    target = tmp_path / path
    if target.suffix in {".safetensors", ".gguf"}:
        target.parent.mkdir()
        target.touch()
    else:
        target.mkdir()
    assert name_for(target) == name
