# SPDX-License-Identifier: Apache-2.0
"""Saved tensors load bit for bit as they were, without a daemon."""

from __future__ import annotations

import gc
import io
import itertools
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from waiting import until

import flashd
from flashd import errors
from flashd.checkpoint.files import Checkpoint, verify
from flashd.tensors import STAND_INS

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.uint4, torch.int4, torch.uint1, torch.bits8, torch.bits16,
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHD_BUS_ADDRESS", "unix:path=/nonexistent")


def bits(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in order, found in another way than the code under test does."""
    whole = tensor.resolve_conj().resolve_neg()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        storage = bytes(whole.untyped_storage())
    size = whole.element_size()
    offsets = [whole.storage_offset()]
    for extent, stride in zip(whole.shape, whole.stride(), strict=True):
        offsets = [offset + index * stride for offset in offsets for index in range(extent)]
    return b"".join(storage[offset * size : (offset + 1) * size] for offset in offsets)


def assert_same(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def random_tensor(dtype: torch.dtype, elements: int, seed: int) -> torch.Tensor:
    """Any bits at all, NaNs with payloads included; of a bool, 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (elements * width,), dtype=torch.uint8, generator=generator
    )
    return raw.view(dtype)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A window of a larger storage, with steps and in any order of dimensions; sometimes of no elements, or of one."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offset = draw(st.integers(0, 7))
    strides, reach = [], 1
    for extent, step in zip(shape, steps, strict=True):
        strides.append(reach * step)
        reach *= max(extent, 1) * step
    order = draw(st.permutations(range(len(shape))))
    if draw(st.booleans()) and shape:
        strides[0] = 0  # an expanded dimension
    base = random_tensor(dtype, offset + reach, draw(st.integers(0, 999)))
    window = base.as_strided(shape, strides, offset)
    made = window.permute(order) if shape else window
    return made.conj() if dtype in {torch.complex64, torch.complex128} and draw(st.booleans()) else made


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(0, 6))):
        names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12)
        name = f"{draw(names)}.{number}"
        again = found and draw(st.integers(0, 3)) == 0  # the same tensor under a further name
        found[name] = draw(st.sampled_from(sorted(found.items())))[1] if again else draw(tensors())
    return {name: tensor for name, tensor in found.items() if name.isprintable()}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state_dicts())
def test_everything_comes_back(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved")
    assert_same(found, saved)
    for (one, tensor), (other, same) in itertools.combinations(saved.items(), 2):
        if tensor is same and tensor.numel():
            assert found[one] is found[other], "what was one tensor is one again"
    verify(Checkpoint.open(tmp_path / "saved"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {"a": random_tensor(dtype, 35, 1).view(5, 7).t(), "one": random_tensor(dtype, 1, 2).view(())}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)


def test_no_dtype_of_torch_was_forgotten(tmp_path: Path) -> None:
    known = {*DTYPES, *(getattr(torch, name) for name in STAND_INS if hasattr(torch, name))}
    left = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)} - known
    assert left == {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}


@pytest.mark.parametrize("elements", [1, 9, 127, 128, 129, 1023, 1024, 1025, 4096 // 4 + 1])
def test_no_tail_is_lost(elements: int, tmp_path: Path) -> None:
    """3x3 is 36 bytes, which is no multiple of 512, nor of 4096."""
    saved = {"w": torch.arange(elements, dtype=torch.float32), "v": torch.ones(3, 3)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)


@pytest.mark.parametrize(
    ("shape", "stride"), [((1,), (2,)), ((1, 1), (0, 3)), ((0,), (0,)), ((4, 1), (1, 9)), ((3,), (0,))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])
def test_strides_that_mean_nothing(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = {"w": random_tensor(dtype, 40, 3).as_strided(shape, stride, 5)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)


def test_other_tools_read_it(tmp_path: Path) -> None:
    saved = {"w": torch.randn(64, 33, dtype=torch.bfloat16).t(), "z": torch.zeros(2, dtype=torch.complex64)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), saved)


def test_smaller_over_larger_leaves_nothing_stale(tmp_path: Path) -> None:
    flashd.save_dict({"w": torch.full((5000,), 7.0), "gone": torch.ones(3)}, tmp_path / "saved")
    saved = {"w": torch.full((7,), 1.0)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_several_buffers_full_and_a_view_across_their_border(tmp_path: Path) -> None:
    count = (300 << 20) // 8  # a buffer is 128 MiB
    saved = {"w": torch.arange(count).view(-1, 1024).t(), "x": torch.arange(1001, dtype=torch.int16)}
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved")
    assert torch.equal(found["w"], saved["w"]) and torch.equal(found["x"], saved["x"])
    verify(Checkpoint.open(tmp_path / "saved"))


def test_over_two_gib(tmp_path: Path) -> None:
    size = (2 << 30) + 4099
    saved = {"big": torch.zeros(size, dtype=torch.uint8), "next": torch.arange(1000, dtype=torch.int32)}
    marks = [0, 1, (1 << 31) - 1, 1 << 31, size - 4096, size - 1]
    saved["big"][marks] = torch.arange(1, 1 + len(marks), dtype=torch.uint8)
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved")
    assert found["big"].shape == (size,) and int(found["big"].count_nonzero()) == len(marks)
    assert found["big"][marks].tolist() == [1, 2, 3, 4, 5, 6] and torch.equal(found["next"], saved["next"])


def test_a_real_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    model[2].weight = model[0].weight
    flashd.save_dict(model.state_dict(), tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved")
    assert_same(found, model.state_dict())
    model.load_state_dict(found)


def test_what_is_loaded_is_ones_own(tmp_path: Path) -> None:
    saved = {"a": torch.ones(100), "b": torch.ones(200)}
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved")
    found["a"].mul_(2)
    assert found["b"].sum() == 200 and flashd.load_dict(tmp_path / "saved")["a"].sum() == 100
    into = io.BytesIO()
    torch.save(found["a"], into)
    assert len(into.getvalue()) < 3000, "and not what lies beside it"


def test_without_waiting(tmp_path: Path) -> None:
    saved = {"w": torch.randn(4 << 20), "v": torch.randn(33)}
    flashd.save_dict(saved, tmp_path / "saved")
    loading, found = flashd.load_dict_non_blocking(tmp_path / "saved", device_map={"": "cpu"})
    loading.wait()
    assert loading.finished
    loading.wait()
    assert_same({"v": found["v"]}, {"v": saved["v"]})
    assert torch.equal(found["w"], saved["w"])


def test_a_load_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    flashd.save_dict({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, tmp_path / "saved")
    gc.collect()  # remnants of earlier tests
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        flashd.load_dict_non_blocking(tmp_path / "saved")

    def nothing_is_left() -> bool:
        gc.collect()
        return set(os.listdir("/proc/self/fd")) <= before[0] and threading.active_count() <= before[1]

    until(nothing_is_left)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, {"a": "cpu", "b.c": "cpu", "b": torch.device("cpu")}])
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    saved = {"a.w": torch.ones(2), "b.c.w": torch.ones(3), "b.d": torch.zeros(4)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved", device_map), saved)


def test_parts_on_other_devices(tmp_path: Path) -> None:
    """torch's meta device stands for one that is not the processor."""
    saved = {"a.w": torch.ones(2), "b.w": torch.ones(3)}
    saved["a.tied"] = saved["a.w"]
    flashd.save_dict(saved, tmp_path / "saved")
    found = flashd.load_dict(tmp_path / "saved", {"a": "meta", "": "cpu"})
    assert found["a.w"].is_meta and found["a.tied"] is found["a.w"]
    assert_same({"b.w": found["b.w"]}, {"b.w": saved["b.w"]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_number_is_the_processor_where_there_is_nothing_else(tmp_path: Path) -> None:
    saved = {"w": torch.ones(2)}
    flashd.save_dict(saved, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved", {"": 0}), saved)
    with pytest.raises(errors.DeviceFailed, match="cuda:0"):
        flashd.load_dict(tmp_path / "saved", "cuda:0")


@pytest.mark.parametrize(
    ("device_map", "word"), [({"a": "cpu"}, "b.w"), ("nonsense", "nonsense"), ({"": "disk"}, "disk")]
)
def test_maps_that_make_no_sense(device_map: Any, word: str, tmp_path: Path) -> None:
    flashd.save_dict({"a.w": torch.ones(2), "b.w": torch.ones(2)}, tmp_path / "saved")
    with pytest.raises(errors.InvalidArgument, match=word):
        flashd.load_dict(tmp_path / "saved", device_map)


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"w": torch.eye(3).to_sparse()}, errors.Unsupported),
        ({"w": torch.empty(3, device="meta")}, errors.Unsupported),
        ({"w": _quantised()}, errors.Unsupported),
        ({"steps": 5}, errors.InvalidArgument),
        ({3: torch.ones(1)}, errors.InvalidArgument),
        ({"evil\x1b[2J": torch.ones(1)}, errors.InvalidArgument),
    ],
    ids=["sparse", "meta", "quantised", "number", "key", "name"],
)
def test_what_cannot_be_saved_changes_nothing(
    state: dict[Any, Any], error: type[errors.FlashdError], tmp_path: Path
) -> None:
    saved = {"w": torch.ones(3)}
    flashd.save_dict(saved, tmp_path / "saved")
    with pytest.raises(error):
        flashd.save_dict({"fine": torch.ones(2), **state}, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_is_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(errors.AlreadyExists):
            flashd.save_dict({"w": torch.ones(1)}, tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    flashd.save_dict({"w": torch.ones(1)}, tmp_path / "empty")
    flashd.save_dict({"w": torch.ones(1)}, tmp_path / "new" / "deeper")


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    for value in (1.0, 2.0):
        flashd.save_dict({"w": torch.full((3,), value)}, tmp_path / "link")
        assert flashd.load_dict(tmp_path / "real")["w"].tolist() == [value] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"} and (tmp_path / "link").is_symlink()


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"w": torch.ones(3)}
    flashd.save_dict(saved, tmp_path / "saved")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(errors.StoreFull):
        flashd.save_dict({"w": torch.ones(3000)}, tmp_path / "saved")
    assert_same(flashd.load_dict(tmp_path / "saved"), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_changed_bit_is_noticed(tmp_path: Path) -> None:
    flashd.save_dict({"w": torch.ones(3000)}, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(errors.CorruptCheckpoint):
        flashd.load_dict(tmp_path / "saved")


@pytest.mark.parametrize(
    "lie", ['{"w": "complex128"}', '{"w": "Tensor"}', '{"w": 5}', "[]", '{"other": "uint4"}', '{"w": "uint4"}']
)
def test_metadata_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    from flashd.checkpoint.header import Header, TensorInfo
    from flashd.io.streamer import Extent
    from flashd.tensors import DTYPES_KEY as KEY
    from flashd.tensors import torch_tensors

    layout = Header((TensorInfo("w", "F64", (3,), Extent(0, 24)),), {KEY: lie}, 0)
    with pytest.raises(errors.Unsupported):
        torch_tensors(torch.zeros(24, dtype=torch.uint8), layout)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFound, match="not a checkpoint"):
        flashd.load_dict(tmp_path / "nothing")
