# SPDX-License-Identifier: Apache-2.0
"""Weights in an image: every view of them stays valid, and shows the weights of whichever image is mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from flashd.errors import CorruptCheckpoint, Unsupported
from flashd.workers.vllm.images import ImageWeights

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED = 0x10


class HostWindow:
    """Addresses of this process that memfds are mapped at: what flashd.io.cuda.Window is on a GPU."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.address = _libc.mmap(None, size_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.is_shown = False

    def show(self, fd: int, mapped_bytes: int, *, is_writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        self._map(protection, mmap.MAP_SHARED, fd, mapped_bytes)
        self.is_shown = True

    def protect(self) -> None:
        pass

    def hide(self) -> None:
        self._map(0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, self.size_bytes)
        self.is_shown = False

    def _map(self, protection: int, flags: int, fd: int, size_bytes: int) -> None:
        assert _libc.mmap(self.address, size_bytes, protection, flags | _MAP_FIXED, fd, 0) == self.address


class HostMemory:
    def rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // PAGE) * PAGE

    def allocate(self, mapped_bytes: int) -> int:
        fd = os.memfd_create("image")
        os.ftruncate(fd, mapped_bytes)
        return fd

    def window(self, mapped_bytes: int) -> HostWindow:
        return HostWindow(mapped_bytes)

    def tensor(self, window: HostWindow, size_bytes: int) -> torch.Tensor:  # type: ignore[override]
        return torch.frombuffer((ctypes.c_char * size_bytes).from_address(window.address), dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16), requires_grad=False)
        self.transposed = nn.Parameter(torch.randn(7, 5).t(), requires_grad=False)
        self.scale = torch.tensor(2.5)  # some layers keep scalars that are neither parameters nor buffers
        self.q_part = self.qkv[:8]  # an unregistered view
        self.register_buffer("bias", torch.randn(3))
        self.register_buffer("rotary", torch.randn(4), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def everything(self) -> dict[str, torch.Tensor]:
        named = {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}
        for index, block in enumerate(self.blocks):
            named |= {f"{index}.scale": block.scale, f"{index}.q_part": block.q_part}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def fill(model: nn.Module) -> None:
    """As vLLM loads other weights in place."""
    for parameter in model.parameters():
        parameter.fill_(1)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_moving_changes_nothing_and_everything_views_the_image() -> None:
    model = Model()
    before = model.everything()
    kept = model.blocks[0].q_part
    weights = ImageWeights(model, HostMemory())
    assert_equal(model.everything(), before)
    names = {info.name: info for info in weights.header.tensors}
    assert names["blocks.0.qkv"].dtype == "BF16" and names["blocks.0.qkv"].shape == (24, 16)
    assert "head.weight" not in names, "what is tied is there once"
    assert "blocks.0.rotary" not in names and "blocks.0.bias" in names
    fd = weights.take_made()
    assert fd is not None and weights.take_made() is None
    with mmap.mmap(fd, 0) as image:
        extent = names["blocks.0.qkv"].extent
        image[extent.offset : extent.end] = bytes(extent.length)
    assert not kept.any() and not model.blocks[0].qkv.any(), "whoever viewed the weights views the image"
    os.close(fd)


def test_two_models_view_one_image_and_change_to_another() -> None:
    first = Model()
    weights = ImageWeights(first, HostMemory())
    of_first, image = first.everything(), weights.take_made()
    assert image is not None
    second = Model()
    other = ImageWeights(second, HostMemory(), image, weights.layout_json)
    for name, tensor in of_first.items():
        if "rotary" not in name:
            assert torch.equal(second.everything()[name], tensor), name
    assert other.take_made() is None

    second_rotary = second.blocks[0].rotary.clone()
    weights.hide()
    weights.renew()
    for parameter in first.parameters():
        parameter.copy_(torch.randn_like(parameter))
    first.blocks[1].bias.fill_(7)
    first.blocks[0].scale.fill_(9)
    weights.finish()
    changed, new_image = first.everything(), weights.take_made()
    assert new_image is not None
    other.show(new_image)
    other.restore_buffers()
    shown = second.everything()
    assert torch.equal(shown["blocks.1.bias"], changed["blocks.1.bias"]) and shown["0.scale"] == 9
    assert torch.equal(shown["0.q_part"], changed["blocks.0.qkv"][:8])
    assert torch.equal(shown["blocks.0.rotary"], second_rotary), "what is computed stays"
    other.show(image)
    other.restore_buffers()
    assert torch.equal(second.everything()["blocks.0.qkv"], of_first["blocks.0.qkv"])
    for fd in (image, new_image):
        os.close(fd)


def test_an_image_of_something_else_is_refused_before_anything_is_touched() -> None:
    weights = ImageWeights(Model(), HostMemory())
    image = weights.take_made()
    assert image is not None
    other = nn.Linear(3, 3)
    before = other.weight.clone()
    with pytest.raises(CorruptCheckpoint):
        ImageWeights(other, HostMemory(), image, ImageWeights(nn.Linear(3, 4), HostMemory()).layout_json)
    assert torch.equal(other.weight, before)
    with pytest.raises(CorruptCheckpoint):
        weights.check(weights.layout_json.replace("blocks.0.qkv", "blocks.0.qvk"))
    os.close(image)


def test_what_loading_replaces_is_put_where_graphs_look_for_it() -> None:
    model = Model()
    weights = ImageWeights(model, HostMemory())
    seen_by_graphs = model.blocks[0].qkv.data, model.blocks[0].scale
    weights.renew()
    fill(model)
    model.blocks[0].qkv.data = torch.full((24, 16), 3, dtype=torch.bfloat16)
    model.blocks[0].scale = torch.tensor(4.0)
    weights.finish()
    qkv, scale = seen_by_graphs
    assert (qkv == 3).all() and scale == 4
    assert model.blocks[0].qkv.data_ptr() == qkv.data_ptr() and model.blocks[0].scale is scale


def test_what_loading_does_not_touch_stays_or_is_missed() -> None:
    model = Model()
    model.factor = torch.tensor(2.5)  # of the configuration, say
    weights = ImageWeights(model, HostMemory())
    weights.renew()
    fill(model)
    weights.finish()
    assert model.factor == 2.5 and model.blocks[0].scale == 2.5
    weights.renew()
    for parameter in [*model.parameters()][1:]:
        parameter.fill_(1)
    with pytest.raises(CorruptCheckpoint, match=r"1 tensors of the model were not loaded in place: embed.weight"):
        weights.finish()


def test_scratch_memory_is_in_no_image_and_stays_where_graphs_look_for_it() -> None:
    model = Model()
    model.workspace = torch.zeros(8)
    model.lock_scale = nn.Parameter(torch.ones(3), requires_grad=False)  # weights, whatever the name
    seen_by_graphs = model.workspace
    weights = ImageWeights(model, HostMemory())
    names = {info.name for info in weights.header.tensors}
    assert "workspace" not in names and "lock_scale" in names
    weights.renew()
    fill(model)
    model.workspace = torch.zeros(8)
    weights.finish()
    assert model.workspace is seen_by_graphs


def test_values_that_depend_on_the_weights_are_noticed_in_images_for_all() -> None:
    model = Model()
    model._k_scale_float = 1.0
    weights = ImageWeights(model, HostMemory())
    weights.renew()
    fill(model)
    model._k_scale_float = 0.02
    with pytest.raises(CorruptCheckpoint, match=r"depend on the weights: _k_scale_float"):
        weights.finish()


def test_what_loading_replaces_by_something_else_is_refused() -> None:
    model = Model()
    weights = ImageWeights(model, HostMemory())
    weights.renew()
    model.blocks[0].qkv.data = torch.zeros(24, 17, dtype=torch.bfloat16)
    with pytest.raises(CorruptCheckpoint, match=r"replaced.*qkv"):
        weights.finish()


class Kernel:
    """As kernels of quantised layers are: with tensors and values made of the weights, and scratch memory."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.workspace = torch.zeros(8)
        self.process(weight)

    def process(self, weight: torch.Tensor) -> None:
        self.factors = {"rows": weight.float().sum(dim=1), "table": torch.zeros(300_000) + weight[0, 0]}
        self.is_positive = bool(weight.sum() > 0)
        self.workspace = torch.zeros(8)


Kernel.__module__ = "vllm.model_executor.kernels"


class Quantised(nn.Module):
    def __init__(self, fill: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), fill), requires_grad=False)
        self.quant_method = Kernel(self.weight)

    def load(self, fill: float) -> None:
        self.weight.fill_(fill)
        self.quant_method.process(self.weight)

    def everything(self) -> list[torch.Tensor]:
        factors = self.quant_method.factors
        return [tensor.clone() for tensor in (self.weight, factors["rows"], factors["table"][:4])]


def test_an_image_of_its_own_has_what_kernels_keep() -> None:
    model = Quantised(1.0)
    seen_by_graphs = [*model.quant_method.factors.values(), model.quant_method.workspace]
    weights = ImageWeights(model, HostMemory(), is_own=True)
    names = {info.name for info in weights.header.tensors}
    assert names == {"weight", "quant_method.factors.rows", "quant_method.factors.table"}, "but not its scratch memory"
    of_first, first = model.everything(), weights.take_made()
    weights.renew()
    model.load(2.0)
    weights.finish()
    of_second, second = model.everything(), weights.take_made()
    assert first is not None and second is not None
    now = [*model.quant_method.factors.values(), model.quant_method.workspace]
    assert [one.data_ptr() for one in now] == [one.data_ptr() for one in seen_by_graphs], "where graphs look for them"
    for image, expected in ((first, of_first), (second, of_second), (first, of_first)):
        weights.hide()
        weights.show(image)
        weights.restore_buffers()
        assert all(torch.equal(one, other) for one, other in zip(model.everything(), expected, strict=True))
        assert seen_by_graphs[0][0] == expected[1][0] and seen_by_graphs[1][0] == expected[2][0]
    for fd in (first, second):
        os.close(fd)


def test_an_image_of_its_own_is_for_no_other_process() -> None:
    weights = ImageWeights(Quantised(1.0), HostMemory(), is_own=True)
    with pytest.raises(CorruptCheckpoint):
        ImageWeights(Quantised(1.0), HostMemory(), is_own=True).check(weights.layout_json)
    with pytest.raises(CorruptCheckpoint):
        ImageWeights(Quantised(1.0), HostMemory()).check(weights.layout_json)


def test_values_that_depend_on_the_weights_are_noticed() -> None:
    model = Quantised(1.0)
    weights = ImageWeights(model, HostMemory(), is_own=True)
    weights.renew()
    model.load(-1.0)
    with pytest.raises(CorruptCheckpoint, match=r"depend on the weights: quant_method.is_positive"):
        weights.finish()


def test_a_tensor_that_came_while_it_served_is_noticed() -> None:
    model = Quantised(1.0)
    weights = ImageWeights(model, HostMemory(), is_own=True)
    model.quant_method.cached = model.weight * 2  # type: ignore[attr-defined]
    weights.renew()
    model.load(2.0)
    with pytest.raises(CorruptCheckpoint, match=r"came to the model while it served: quant_method.cached"):
        weights.finish()


def test_a_model_that_writes_to_its_weights_gives_them_up_for_good() -> None:
    model = Quantised(1.0)
    weights = ImageWeights(model, HostMemory(), is_own=True)
    model.quant_method.workspace.fill_(5)
    weights.check_unwritten()
    weights.hide()
    image = weights.take_made()
    assert image is not None
    weights.show(image)
    weights.restore_buffers()
    model.weight.fill_(3)
    with pytest.raises(Unsupported, match="writes to its weights"):
        weights.check_unwritten()
    with pytest.raises(Unsupported, match="writes to its weights"):
        weights.renew()
    os.close(image)
