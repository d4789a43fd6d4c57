# SPDX-License-Identifier: Apache-2.0
"""Puts the weights of a vLLM model into one allocation that can be mapped, unmapped and published.

After vLLM has loaded and processed the weights, all storages of its parameters (and of other large tensors in modules)
are copied into one allocation, and every tensor of the process that viewed one of these storages views its new place.
That allocation is the image of the checkpoint. From then on the model gets other weights by mapping another image of
the same layout at the same addresses, which captured graphs do not notice.

Small tensors that are not parameters, and buffers that come from a checkpoint, stay in vLLM's memory; an image has a
copy of them, which is copied back.

Some quantisation methods keep more of the weights than tensors of modules: tensors in kernels, and values that no other
process is known to compute equally. The image of such a model is its process's own: it has all that the objects of the
model keep (flashd/workers/vllm/module_state.py), no other process can map it, and another checkpoint may follow only if
it leads to equal values.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from flashd.checkpoint import header as headers
from flashd.checkpoint.header import Header
from flashd.checkpoint.layout import Shape, arrange
from flashd.errors import CorruptCheckpoint, Unsupported
from flashd.io import cuda
from flashd.io.streamer import Extent
from flashd.tensors import device_bytes_tensor, dtype_name
from flashd.units import MiB
from flashd.workers.vllm.module_state import ModuleState, module_state

ATTRIBUTE = "flashd_weights"  # attribute of a model: its ImageWeights, if any
_SCRATCH = {"workspace", "locks", "per_layer_embeddings"}  # names of tensors to which models write at every step
_LARGE_BYTES = 1 * MiB  # smaller tensors that are no parameters stay where they are, and are copied like buffers
_UNWRITTEN = 0xA5  # every byte of memory that is to be filled in place
_EDGE_BYTES = 4096
_MOST_NAMES = 5


class Window(Protocol):
    """Addresses at which allocations are mapped, one at a time (flashd.io.cuda.Window)."""

    def show(self, fd: int, mapped_bytes: int, *, is_writable: bool) -> None: ...

    def protect(self) -> None: ...

    def hide(self) -> None: ...


class Memory(Protocol):
    """The memory for images."""

    def rounded(self, size_bytes: int) -> int: ...

    def allocate(self, mapped_bytes: int) -> int:
        """Allocates memory, and returns a descriptor, which the caller closes."""

    def window(self, mapped_bytes: int) -> Window: ...

    def tensor(self, window: Window, size_bytes: int) -> torch.Tensor:
        """Returns a tensor of all bytes of a window with a mapped allocation."""


class GpuMemory:
    """Memory of this process's GPU."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal

    def rounded(self, size_bytes: int) -> int:
        return cuda.rounded(size_bytes)

    def allocate(self, mapped_bytes: int) -> int:
        return cuda.allocate(self._ordinal, mapped_bytes)

    def window(self, mapped_bytes: int) -> cuda.Window:
        return cuda.Window(self._ordinal, mapped_bytes)

    def tensor(self, window: Window, size_bytes: int) -> torch.Tensor:
        assert isinstance(window, cuda.Window)
        return device_bytes_tensor(window, window.address, size_bytes, self._ordinal)


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a tensor of the model has to stay, because captured graphs have its address."""

    tensor: torch.Tensor
    view: torch.Tensor  # of that place, whatever `tensor` is made to view


class ImageWeights:
    """The weights of one model, at fixed addresses."""

    def __init__(
        self, model: nn.Module, memory: Memory, fd: int | None = None, layout: str = "", *, is_own: bool = False
    ) -> None:
        """Moves a model's weights into a new image, or, with `fd` and `layout`, makes the model use that image.

        No other process can map an image that `is_own`. The caller closes `fd`. Raises CorruptCheckpoint if the layout
        does not match the model. No graphs may be captured yet.
        """
        self.is_own = is_own
        found = _Found.of(model, with_kernels=is_own)
        self.header = _layout(found, maker=secrets.token_hex(16) if is_own else "")
        self.layout_json = headers.as_json(self.header)
        self.mapped_bytes = memory.rounded(self.header.data_bytes)
        if fd is not None:
            self.check(layout)
        self._memory = memory
        self._buffers = found.copied
        self._places = {info.name: info.extent for info in self.header.tensors}
        self._window = memory.window(self.mapped_bytes)
        self._made: int | None = None  # returned by `take_made`
        self._before: ModuleState | None = None  # what the model kept before other weights were loaded in place
        self._sum: int | None = None  # of the mapped image, if this process could write to it
        if fd is None:
            self._show_fresh()
        else:
            self._window.show(fd, self.mapped_bytes, is_writable=is_own)
        self._base = memory.tensor(self._window, self.mapped_bytes)
        self._model = weakref.ref(model)
        self._move(found, copies=fd is None)
        self._homes = self._homes_of(model)
        if fd is None:
            self.finish()
        else:
            self.restore_buffers()

    def check(self, layout: str) -> None:
        """Checks that an image has exactly our layout. Raises CorruptCheckpoint."""
        if layout != self.layout_json:  # layouts of the same build and model are identical texts
            raise CorruptCheckpoint("the image is not of this engine's build of this model")

    def show(self, fd: int) -> None:
        """Maps another image, in place of the current one, on which the GPU's work must have ended.

        Buffers still have their old values: see `restore_buffers`. Raises Unsupported if the model has written to its
        weights.
        """
        self.check_unwritten()
        self._sum = None
        self._window.show(fd, self.mapped_bytes, is_writable=self.is_own)

    def renew(self) -> None:
        """Maps new memory, to be filled in place. Then call `finish`.

        Raises Unsupported if the model has written to its weights.
        """
        self.check_unwritten()
        model = self._model()
        assert model is not None
        self._before, self._sum = module_state(model), None
        self._show_fresh()
        self._base.fill_(_UNWRITTEN)

    def hide(self) -> None:
        """Unmaps the memory and keeps the addresses. The GPU's work on it must have ended."""
        self._sum = None
        self._window.hide()

    def finish(self) -> None:
        """Finishes an image, to which nothing is written from now on.

        Tensors that loading has replaced are copied to where captured graphs look for them. Raises CorruptCheckpoint if
        one has another form, if one was not filled, or if the model keeps other values than before.
        """
        model = self._model()
        assert model is not None
        now = module_state(model)
        self._put_back(now)
        if self._before is not None:
            self._check_filled()
            self._check_equal(self._before, now)
            self._before = None
        for name, buffer in self._buffers.items():
            self._view(name, buffer).copy_(buffer)
        if self.is_own:
            self._sum = self._summed()
        else:
            self._window.protect()

    def check_unwritten(self) -> None:
        """Raises Unsupported if the model has written to its weights since they were mapped."""
        if self._sum is not None and self._sum != self._summed():
            raise Unsupported("the model writes to its weights while it serves")

    def restore_buffers(self) -> None:
        """Restores the buffers of the mapped image in one step, because there may be hundreds of small ones."""
        if self._buffers:
            shown = [self._view(name, buffer) for name, buffer in self._buffers.items()]
            torch._foreach_copy_(list(self._buffers.values()), shown)
        self._sum = self._summed() if self.is_own else None

    def take_made(self) -> int | None:
        """Returns the descriptor of the last new image once. The caller closes it."""
        made, self._made = self._made, None
        return made

    def _show_fresh(self) -> None:
        fd = self._memory.allocate(self.mapped_bytes)
        self._window.show(fd, self.mapped_bytes, is_writable=True)
        self._made = fd

    def _move(self, found: _Found, *, copies: bool) -> None:
        names = {_address(tensor): name for name, tensor in found.moved.items()}
        if copies:
            for name, tensor in found.moved.items():
                extent = self._places[name]
                self._base[extent.offset : extent.end].copy_(_bytes_of(tensor))
        for tensor in _viewers(names):
            tensor.data = self._view(names[_address(tensor)], tensor)

    def _homes_of(self, model: nn.Module) -> dict[str, _Home]:
        """All tensors of the model must stay, also those that are in no image: graphs have the addresses of all."""
        tensors = module_state(model).tensors
        return {path: _Home(kept.tensor, kept.tensor.detach()) for path, kept in tensors.items()}

    def _check_filled(self) -> None:
        """Raises CorruptCheckpoint if nothing was written to the place of a tensor in new memory."""
        places = {name: place for name, place in self._places.items() if name not in self._buffers and place.length}
        left = [name for name, place in places.items() if bool((self._edges(place) == _UNWRITTEN).all())]
        if left:
            raise CorruptCheckpoint(f"{len(left)} tensors of the model were not loaded in place: {_some(left)}")

    def _edges(self, place: Extent) -> torch.Tensor:
        """The first and the last bytes of a place."""
        first, last = min(place.end, place.offset + _EDGE_BYTES), max(place.offset, place.end - _EDGE_BYTES)
        return torch.cat([self._base[place.offset : first], self._base[last : place.end]])

    def _check_equal(self, before: ModuleState, now: ModuleState) -> None:
        """Raises CorruptCheckpoint if other weights made the model keep other values.

        Besides, kernels may not have tensors that they made while they served: these may be of the weights before.
        """
        other = [path for path, value in now.values.items() if before.values.get(path) != value]
        other += before.values.keys() - now.values.keys()
        if other:
            raise CorruptCheckpoint(f"{len(other)} values that the model keeps depend on the weights: {_some(other)}")
        if self.is_own and (late := [path for path in now.tensors if path not in self._homes]):
            raise CorruptCheckpoint(f"{len(late)} tensors came to the model while it served: {_some(late)}")

    def _put_back(self, now: ModuleState) -> None:
        misfits = []
        for path, home in self._homes.items():
            kept = now.tensors.get(path)
            if kept is not None and kept.tensor.data_ptr() == home.view.data_ptr():
                continue
            if kept is not None and _form(kept.tensor) == _form(home.view) and kept.may_be_put:
                if not _is_scratch(path, home.tensor):
                    home.view.copy_(kept.tensor)
                if kept.tensor is not home.tensor:
                    kept.put(home.tensor)
                home.tensor.data = home.view
            elif self.is_own or _address(home.view) == self._base.data_ptr():
                misfits.append(path)
        if misfits:
            raise CorruptCheckpoint(f"{len(misfits)} tensors of the model were replaced by others: {_some(misfits)}")

    def _summed(self) -> int:
        return int(self._base[: len(self._base) // 8 * 8].view(torch.int64).sum())

    def _view(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns a view of the image like `like`, which views the storage of this name."""
        offset = self._places[name].offset // like.element_size()
        offset += like.storage_offset() if name not in self._buffers else 0
        view = torch.empty(0, dtype=like.dtype, device=like.device)
        return view.set_(self._base.untyped_storage(), offset, like.size(), like.stride())


@dataclass(frozen=True, slots=True)
class _Found:
    """Tensors of a model by name: one for each storage that is `moved` into an image, and those that are `copied`."""

    moved: dict[str, torch.Tensor]
    copied: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module, *, with_kernels: bool) -> _Found:
        """`with_kernels`: also tensors that are kept by other objects than modules."""
        paths = {path for path, _ in model.named_modules()}
        moved: dict[str, torch.Tensor] = {}
        small: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        tensors = {path: kept.tensor for path, kept in module_state(model).tensors.items()}
        # Parameters first, lest a storage be known by a tensor that is a view of a part of one.
        for path, tensor in sorted(tensors.items(), key=lambda item: not isinstance(item[1], nn.Parameter)):
            is_of_module = path.rpartition(".")[0] in paths
            if _is_scratch(path, tensor) or not (is_of_module or with_kernels) or _address(tensor) in seen:
                continue
            seen.add(_address(tensor))
            size_bytes = tensor.untyped_storage().nbytes()
            is_whole = tensor.is_contiguous() and tensor.nbytes == size_bytes
            is_moved = isinstance(tensor, nn.Parameter) or size_bytes >= _LARGE_BYTES or not is_whole
            (moved if is_moved else small)[path] = tensor
        return cls(moved, {**dict(_buffers(model, seen)), **small})


def _is_scratch(path: str, tensor: torch.Tensor) -> bool:
    return path.rpartition(".")[2] in _SCRATCH and not isinstance(tensor, nn.Parameter)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.dtype, tensor.shape, tensor.stride())


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_MOST_NAMES])


def _layout(found: _Found, *, maker: str) -> Header:
    """Makes the layout, with one entry for each storage: the tensor that covers it, if there is one, else bytes.

    With the name of its `maker`, it equals the layout of no other process.
    """
    shapes = [_shape(name, tensor, tensor.untyped_storage().nbytes()) for name, tensor in found.moved.items()]
    shapes += [_shape(name, buffer, buffer.nbytes) for name, buffer in found.copied.items()]
    return Header(arrange(shapes), {"format": "pt", **({"maker": maker} if maker else {})})


def _shape(name: str, tensor: torch.Tensor, size_bytes: int) -> Shape:
    if tensor.is_contiguous() and tensor.nbytes == size_bytes:
        with contextlib.suppress(Unsupported):  # safetensors has no name for all dtypes
            return Shape(name, dtype_name(tensor.dtype), tuple(tensor.shape), size_bytes)
    return Shape(name, "U8", (size_bytes,), size_bytes)


def _buffers(model: nn.Module, moved: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields buffers that may be in a checkpoint. Others, computed from the configuration, are equal for all models."""
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.nbytes and _address(buffer) not in moved:
            if not buffer.is_contiguous():
                raise CorruptCheckpoint(f"the buffer {name} is not contiguous")
            yield name, buffer


def _viewers(addresses: Mapping[int, str]) -> list[torch.Tensor]:
    """Returns all tensors of this process that view one of these storages."""
    found: dict[int, torch.Tensor] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # some have no storage
                if _address(candidate) in addresses:
                    found[id(candidate)] = candidate
    return list(found.values())


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole storage of a tensor as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
