# SPDX-License-Identifier: Apache-2.0
"""Errors, units and names, on which everything else relies."""

from __future__ import annotations

import shutil
import subprocess
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd import errors, units
from flashd.dbus import wire


def error_classes() -> list[type[errors.FlashdError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FlashdError)]


@pytest.mark.parametrize("cls", error_classes()[1:], ids=lambda cls: cls.__name__)
def test_an_error_survives_the_bus(cls: type[errors.FlashdError]) -> None:
    back = errors.from_bus(cls.bus_name(), "it broke", "mend it")
    assert type(back) is cls
    assert (back.message, back.hint) == ("it broke", "mend it")
    assert f"{cls.exit_status:>4}" in str(errors.__doc__).split(cls.__name__ + " ", 1)[1].splitlines()[0]


def test_a_foreign_bus_error_is_kept_whole() -> None:
    back = errors.from_bus("org.freedesktop.DBus.Error.NoReply", "late")
    assert isinstance(back, errors.Internal)
    assert "NoReply" in back.message and "late" in back.message


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_path_elements_are_valid_and_reversible(label: str) -> None:
    element = wire.escape(label)
    assert element and all(c.isascii() and (c.isalnum() or c == "_") for c in element)
    assert wire.unescape(element) == label


def test_different_names_have_different_paths() -> None:
    assert wire.model_path("a/b") != wire.model_path("a_b") != wire.model_path("a_2fb")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("64GB", 64 * 10**9), ("64 GiB", 64 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("12", 12), (7, 7)],
)
def test_sizes_are_read_as_written(text: str | int, size_bytes: int) -> None:
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 furlong", "1e9", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        units.parse_bytes(text)
    assert caught.value.hint


def test_sizes_and_times_are_written_for_people() -> None:
    assert [units.format_bytes(n) for n in (0, 999, 16_381_470_720, 1_500_000_000_000)] == [
        "0 B", "999 B", "16.4 GB", "1.5 TB",
    ]  # fmt: skip
    assert [units.format_seconds(s) for s in (0.0009, 0.058, 1.25, 125)] == ["0.9 ms", "58 ms", "1.25 s", "2 min 05 s"]


@pytest.mark.parametrize("interface", wire.INTERFACES)
def test_interface_xml_is_documented(interface: str) -> None:
    node = ElementTree.fromstring(wire.interface_xml(interface))
    (root,) = node.findall("interface")
    assert root.get("name") == interface
    members = [root, *root.findall("method"), *root.findall("signal"), *root.findall("property"), *root.iter("arg")]
    for member in members:
        docs = [a.get("value") for a in member.findall("annotation") if a.get("name") == "org.gtk.GDBus.DocString"]
        assert docs and docs[0], f"{interface}.{member.get('name')} is not documented"


@pytest.mark.parametrize("interface", wire.INTERFACES)
def test_interface_xml_is_well_formed(interface: str) -> None:
    if shutil.which("xmllint") is None:
        pytest.skip("needs xmllint (libxml2-utils)")
    subprocess.run(["xmllint", "--noout", "-"], input=wire.interface_xml(interface), text=True, check=True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (wire.job_path(99), "job 99"),
        (wire.engine_path(3), "engine 3"),
        (wire.model_path("Qwen/Qwen3-0.6B"), "model 'Qwen/Qwen3-0.6B'"),
        (wire.device_path("cuda:0"), "device 'cuda:0'"),
        (wire.model_path("\x1b[31m"), r"model '\x1b[31m'"),
        ("/org/flashd1/model/_zz", "object at /org/flashd1/model/_zz"),
        ("/org/flashd1/new/thing", "object at /org/flashd1/new/thing"),
    ],
)
def test_a_path_in_words(path: str, words: str) -> None:
    assert wire.called(path) == words
