# SPDX-License-Identifier: Apache-2.0
"""Settings: their sources, their precedence, and that no mistake silently becomes a default."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashd.config import loading
from flashd.config.environment import for_engines, inherited_fds
from flashd.config.paths import Paths, Scope, default_paths
from flashd.config.settings import Config, ModelConfig
from flashd.errors import InvalidArgument, TransferFailed


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "flashd.toml", tmp_path / "state", tmp_path / "run", tmp_path / "models")


def test_defaults_lie_where_the_paths_say(paths: Paths) -> None:
    loaded = loading.load(paths)
    assert loaded.store.path == paths.state / "store"
    assert loaded.inbox.folders == (paths.models,)


def test_file_drop_ins_in_order_and_overrides_count_in_that_order(paths: Paths) -> None:
    paths.config.write_text(
        '[engines]\nmax_parked = 1\ndrain_timeout_s = 1\nstart_timeout_s = 1\n[store]\nquota = "1GB"'
    )
    paths.drop_ins.mkdir()
    (paths.drop_ins / "20-b.toml").write_text("[engines]\ndrain_timeout_s = 3\n")
    (paths.drop_ins / "10-a.toml").write_text("[engines]\ndrain_timeout_s = 2\nmax_parked = 2\n")
    (paths.drop_ins / "note.txt").write_text("not [ toml")
    loaded = loading.load(paths, {"engines.start_timeout_s": 4})
    assert (loaded.engines.max_parked, loaded.engines.drain_timeout_s, loaded.engines.start_timeout_s) == (2, 3.0, 4.0)
    assert loaded.store.quota_bytes == 10**9


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[memory]\nhost_bugdet = 3", "memory.host_bugdet", "memory.host_budget"),
        ("[memroy]\nhost_budget = 3", "memroy", "did you mean|all settings"),
        ("[engines.torch]\nthraeds = 3", "engines.torch.thraeds", "engines.torch.threads"),
        ("[memory]\nhost_budget = 'lots'", "'lots' is not a size", "64GB"),
        ("[memory]\nhost_budget = true", "cannot be True", "whole number"),
        ("[streamer]\ndepth = 1.5", "cannot be 1.5", "whole number"),
        ("[streamer]\ndepth = -1", "cannot be -1", "not below 0"),
        ("[streamer]\ndirect = 1", "cannot be 1", "true or false"),
        ("[streamer]\nbackend = 'fast'", "cannot be 'fast'", "auto or io_uring or threads"),
        ("[inbox]\nfolders = '/one'", "is a list", "["),
        ("[inbox]\nfolders = ['models']", "relative", "an absolute path"),
        ("[inbox]\nsettle_s = nan", "cannot be nan", "not below 0"),
        ("[store]\npath = 3", "cannot be 3", "path"),
        ("store = 3", "store is a section", "[store]"),
        ("models.ada = 3", 'models."ada" is a section', '[models."ada"]'),
        ("[models.ada]\nengin = 'vllm'", "models.ada.engin", "models.NAME.engine"),
        ("[models.ada]\nengine = 'llama'", "cannot be 'llama'", "default or torch or vllm"),
        ("[models.ada]\nidle_timeout_s = 'never'", "cannot be 'never'", "number"),
        ("[models.ada]\nkv_cache = 'lots'", "'lots' is not a size", "64GB"),
        ("[store", "is not TOML", "correct"),
        (f"[store]\nquota = {'1' * 5000}", "is not TOML", "correct"),
        ("[store]\nquota = 0xfffffffffffffffff", "64 bits", "correct"),
        ("[store]\nquota = '99999999999GB'", "larger than the memory of any machine", "64GB"),
        (f"[store]\nquota = '{'9' * 400}GB'", "is not a size", "64GB"),
        (f"[store]\nquota = {'[' * 3000}{']' * 3000}", "nested too deeply", "correct"),
        (f"[store]\nquota = {{{'a.' * 3000}a = 1}}", "nested too deeply", "correct"),
        ("[store]\npath = '~nobody-there/store'", "relative", "an absolute path"),
        ('[store]\npath = "/a\\u0000b"', "cannot be", "zero byte"),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_remedy(paths: Paths, text: str, said: str, hint: str) -> None:
    paths.config.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        loading.load(paths)
    assert said in caught.value.message
    assert any(part in caught.value.hint for part in hint.split("|"))


def test_an_error_fits_on_a_screen_however_long_what_it_is_about(paths: Paths) -> None:
    for key, value in (("store.keep_versions", "x" * 100_000), ("x" * 100_000, "1")):
        with pytest.raises(InvalidArgument) as caught:
            loading.set_value(paths, key, value)
        assert len(str(caught.value)) < 1000
    with pytest.raises(InvalidArgument, match="UTF-8"):
        loading.set_value(paths, "store.private_group", "\udc80")
    assert not paths.drop_ins.exists(), "nothing was written"


def test_what_is_dumped_is_read_back(paths: Paths) -> None:
    loaded = loading.load(paths, {"memory.host_budget": "64GB", "inbox.folders": ["/a", "/b"], "store.quota": 12345})
    paths.config.write_text(loading.dump(loaded))
    elsewhere = dataclasses.replace(paths, state=Path("/nowhere"), models=Path("/nowhere"))
    assert loading.load(elsewhere) == loaded
    assert 'host_budget = "64GB"' in loading.dump(loaded)


def test_what_one_model_has_different_is_found_by_any_of_its_names(paths: Paths) -> None:
    paths.config.write_text('[models."Qwen/Qwen3-0.6B"]\nengine = "vllm"\nkv_cache = "4GiB"\n')
    loading.set_value(paths, "models.Qwen/Qwen3-0.6B.arguments", '["--max-num-seqs", "8"]')
    loading.set_value(paths, 'models."Qwen/Qwen3-0.6B".idle_timeout_s', "60")
    loading.set_value(paths, "models.Qwen/Qwen3-0.6B.kv_cache", "default")
    loaded = loading.load(paths)
    assert set(loaded.models) == {"Qwen/Qwen3-0.6B"}
    for names in (("Qwen/Qwen3-0.6B",), ("mine", "Qwen/Qwen3-0.6B")):
        assert loaded.model(*names) == ModelConfig("vllm", 60.0, ("--max-num-seqs", "8"), "default")
    assert loaded.model("mine") == ModelConfig()
    paths.config.write_text(loading.dump(loaded))
    assert loading.load(paths) == loaded


def test_a_setting_of_one_model_has_its_key_its_value_and_its_default(paths: Paths) -> None:
    loaded = loading.load(paths, {"models.v1.5.engine": "vllm"})
    assert loading.value_of(loaded, "models.v1.5.engine") == "vllm"
    assert loading.value_of(loaded, "models.v1.5.kv_cache") == "default"
    assert loading.value_of(loaded, "models.other.engine") == "default"
    assert loading.find("models.v1.5.engine").doc == loading.find("models.NAME.engine").doc
    for key in ("models.engine", "models..engine", "models.ada.engin", "models"):
        with pytest.raises(InvalidArgument, match="no setting"):
            loading.find(key)


@given(size_bytes=st.integers(0, 1 << 60))
def test_every_size_is_written_exactly(size_bytes: int) -> None:
    with_it = loading.with_value(Config(), "store.quota", size_bytes)
    written = loading.value_of(with_it, "store.quota")
    assert loading.with_value(Config(), "store.quota", written) == with_it


def test_a_changed_setting_goes_to_a_drop_in_and_leaves_the_file_alone(paths: Paths) -> None:
    text = "# mine\n[engines]\nmax_parked = 1\n"
    paths.config.write_text(text)
    assert not loading.set_value(paths, "engines.max_parked", "4").live
    assert loading.set_value(paths, "engines.idle_timeout_s", "60").live
    loading.set_value(paths, "inbox.folders", '["/a", "/b"]')
    loading.set_value(paths, "store.path", "/srv/models")  # a bare word is a string
    loaded = loading.load(paths)
    assert (loaded.engines.max_parked, loaded.engines.idle_timeout_s) == (4, 60.0)
    assert (loaded.inbox.folders, loaded.store.path) == ((Path("/a"), Path("/b")), Path("/srv/models"))
    assert paths.config.read_text() == text


@pytest.mark.parametrize(("key", "value"), [("engines.max_parkt", "4"), ("engines", "4"), ("engines.max_parked", "x")])
def test_a_refused_change_writes_nothing(paths: Paths, key: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        loading.set_value(paths, key, value)
    assert not paths.drop_ins.exists()


def test_a_change_that_cannot_be_written_says_why(paths: Paths) -> None:
    paths.drop_ins.symlink_to("nowhere")
    with pytest.raises(TransferFailed, match="cannot write"):
        loading.set_value(paths, "engines.max_parked", "4")


def test_every_setting_is_documented_once_and_has_its_default() -> None:
    found = list(loading.settings())
    assert len({setting.key for setting in found}) == len(found)
    for setting in found:
        assert setting.doc.endswith("."), setting.key
        assert loading.value_of(Config(), setting.key) == setting.default


def test_paths_follow_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert default_paths(Scope.USER).config == tmp_path / ".config/flashd/flashd.toml"
    assert default_paths(Scope.USER).models == tmp_path / "models"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "r"))
    user = default_paths(Scope.USER)
    assert user.config == tmp_path / ".config/flashd/flashd.toml"
    assert (user.state, user.runtime) == (tmp_path / "s/flashd", tmp_path / "r/flashd")
    assert default_paths(Scope.SYSTEM).state == Path("/var/lib/flashd")


def test_what_a_service_manager_kept_is_taken_once_and_only_by_whom_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """sd_listen_fds(3); descriptors from 3 on are pytest's own here, so none is counted."""
    for pid, count, names, expected in (
        (str(os.getpid()), "0", "", 0), ("1", "5", "a:b", 0), (str(os.getpid()), "many", "", 0)
    ):  # fmt: skip
        for name, value in (("LISTEN_PID", pid), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)):
            monkeypatch.setenv(name, value)
        assert len(inherited_fds()) == expected
        assert not any(name.startswith("LISTEN") for name in os.environ), "children must not take them for theirs"


def test_engines_elsewhere_see_the_gpus_that_the_daemon_sees_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/root/cache")
    found = for_engines()
    assert found["TORCHINDUCTOR_DETERMINISTIC"] == "1" and "TORCHINDUCTOR_CACHE_DIR" not in found
    assert (found["CUDA_VISIBLE_DEVICES"], found["NCCL_DEBUG"]) == ("3,1", "INFO")
    assert not found.keys() & {"HF_TOKEN", "PATH", "HOME", "NOTIFY_SOCKET"}
