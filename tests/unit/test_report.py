# SPDX-License-Identifier: Apache-2.0
"""Things that a report must not contain. tests/bus and tests/system make whole reports."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.cli.redaction import Redactor, numbered
from flashd.dbus import wire

# Made-up secrets in the form of real ones.
SECRETS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx",
    "sk-" + "proj-abc123def456ghi789",
    "ghp_" + "0123456789abcdefghij",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "erin@example.org",
    "192.168.17.4",
    "/home/erin/models/secret-project/model.safetensors",
    "/root/notes.txt",
]
AROUND = st.text(alphabet=string.ascii_letters + " \n", max_size=20)


@given(secret=st.sampled_from(SECRETS), before=AROUND, after=AROUND)
def test_what_looks_like_a_secret_is_taken_out_wherever_it_stands(secret: str, before: str, after: str) -> None:
    assert secret not in Redactor({}).clean(f"{before} {secret} {after}")


@pytest.mark.parametrize(
    "line",
    [
        "HF_TOKEN=swordfish", "api_key: swordfish", 'password = "swordfish and more swordfish"',
        "Authorization: Bearer swordfish", "--api-key swordfish", "https://erin:swordfish@example.org/x",
        '{"access_token": "swordfish"}', "curl -H 'Cookie: id=swordfish'",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nswordfish\n-----END OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nswordfish",
    ],
)  # fmt: skip
def test_whatever_calls_itself_a_secret_loses_its_value(line: str) -> None:
    assert "swordfish" not in Redactor({}).clean(line)


@given(
    name=st.text(alphabet=string.ascii_letters + string.digits + "/._- ", min_size=2, max_size=30).map(str.strip)
    .filter(lambda name: len(name) > 1 and name.isascii() and name[0].isalnum() and name[-1].isalnum()),
    around=st.sampled_from(["{} is a model", "import of {}: done", "'{}'", "/org/flashd1/model/{}", "({})"]),
)  # fmt: skip
def test_names_of_models_become_numbers_also_in_paths(name: str, around: str) -> None:
    written = wire.escape(name) if "/model/" in around else name
    cleaned = Redactor(numbered([name], "model")).clean(around.format(written))
    assert cleaned == around.format("model-1")


def test_a_long_name_goes_before_a_short_one_that_is_part_of_it() -> None:
    redactor = Redactor(numbered(["ada", "ada/secret-project"], "model"))
    assert redactor.clean("ada/secret-project and ada") == "model-2 and model-1"


@pytest.mark.parametrize(
    "sentence",
    [
        "'{}' is empty or too long for the name of a model",
        "2 files are missing, the first is {}-00002-of-3.safetensors",
        "{}.gguf is cut short", "/srv/store/models/{} (v2).damaged was damaged and is not used", '"{}" has no config',
    ],
)  # fmt: skip
def test_sentences_name_nothing_that_nobody_knows_by_now(sentence: str) -> None:
    assert "falcon" not in Redactor({}).clean_sentences(sentence.format("project-falcon"))


def test_names_are_known_in_every_spelling_and_by_their_parts() -> None:
    redactor = Redactor(numbered(["erin/proj\u00e9t f\u00e1lcon", "top\u202esecret"], "model"))
    text = "proje\u0301t fa\u0301lcon.safetensors and proj%C3%A9t f%C3%A1lcon.toml by erin, top\\u202esecret"
    assert redactor.clean(text) == "model-1.safetensors and model-1.toml by model-1, model-2"


def test_sentences_keep_what_helps() -> None:
    text = (
        "import failed 'model-1': config.json has no architectures; model-00001-of-00002.safetensors is cut short\n"
        "File \"/opt/flashd/flashd/store/inbox.py\", line 3: the engine couldn't start, it wasn't there"
    )
    assert Redactor({}).clean_sentences(text) == text


def test_what_helps_stays() -> None:
    text = "loaded 0123456789ab, 16.4 GB at 1.71 GB/s (io_uring, direct)\n/var/lib/flashd/store Linux 6.8.0-1014-nvidia"
    assert Redactor({"erin": "[user]"}).clean(text) == text
    digest = "0123456789abcdef" * 4
    assert Redactor({}).clean(digest) == digest
