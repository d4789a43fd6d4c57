# SPDX-License-Identifier: Apache-2.0
"""Puts the weights of a vLLM model into one allocation that can be mapped, unmapped and published.

After vLLM has loaded and processed the weights, all storages of its parameters (and of plain tensors in its modules)
are copied into one allocation, and every tensor of the process that viewed one of these storages views its new place.
That allocation is the image of the checkpoint. From then on the model gets other weights by mapping another image of
the same layout at the same addresses, which captured graphs do not notice.

Buffers that come from a checkpoint stay in vLLM's memory, because its sleep mode saves and restores them; an image has
a copy of them, which is copied back.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from flashd.checkpoint import header as headers
from flashd.checkpoint.header import Header
from flashd.checkpoint.layout import Shape, arrange
from flashd.errors import CorruptCheckpoint
from flashd.io import cuda
from flashd.tensors import device_bytes_tensor, dtype_name

ATTRIBUTE = "flashd_weights"  # attribute of a model: its ImageWeights, if any


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


class ImageWeights:
    """The weights of one model, at fixed addresses."""

    def __init__(self, model: nn.Module, memory: Memory, fd: int | None = None, layout: str = "") -> None:
        """Moves a model's weights into a new image, or, with `fd` and `layout`, makes the model use that image.

        The caller closes `fd`. Raises CorruptCheckpoint if the layout does not match the model. No graphs may be
        captured yet.
        """
        self.header = _layout(model)
        self.layout_json = headers.as_json(self.header)
        self.mapped_bytes = memory.rounded(self.header.data_bytes)
        if fd is not None:
            self.check(layout)
        self._memory = memory
        self._buffers = dict(_buffers(model))
        self._places = {info.name: info.extent for info in self.header.tensors}
        self._window = memory.window(self.mapped_bytes)
        self._made: int | None = None  # returned by `take_made`
        if fd is None:
            self._show_fresh()
        else:
            self._window.show(fd, self.mapped_bytes, is_writable=False)
        self._base = memory.tensor(self._window, self.mapped_bytes)
        self._model = weakref.ref(model)
        self._homes = self._move(model, copies=fd is None)
        if fd is None:
            self.finish()
        else:
            self.restore_buffers()

    def check(self, layout: str) -> None:
        """Checks that an image has exactly our layout. Raises CorruptCheckpoint."""
        if layout != self.layout_json:  # layouts of the same build and model are identical texts
            raise CorruptCheckpoint("the image is not of this engine's build of this model")

    def show(self, fd: int) -> None:
        """Maps another image for reading, in place of the current one, on which the GPU's work must have ended.

        Buffers still have their old values: see `restore_buffers`.
        """
        self._window.show(fd, self.mapped_bytes, is_writable=False)

    def renew(self) -> None:
        """Maps new memory, to be filled in place. Then call `finish`."""
        self._show_fresh()

    def hide(self) -> None:
        """Unmaps the memory and keeps the addresses. The GPU's work on it must have ended."""
        self._window.hide()

    def finish(self) -> None:
        """Finishes an image, which is read-only from now on.

        Raises CorruptCheckpoint if tensors no longer view it, because it was not filled in place.
        """
        model = self._model()
        assert model is not None
        moved = self._homes.items() - {(name, tensor.data_ptr()) for name, tensor in _tensors(model)}
        if moved:
            names = ", ".join(sorted(name for name, _ in moved)[:5])
            raise CorruptCheckpoint(f"{len(moved)} tensors of the model were replaced while it was loaded: {names}")
        for name, buffer in self._buffers.items():
            self._view(name, buffer).copy_(buffer)
        self._window.protect()

    def restore_buffers(self) -> None:
        """Restores the buffers of the mapped image in one step, because there may be hundreds of small ones."""
        if self._buffers:
            shown = [self._view(name, buffer) for name, buffer in self._buffers.items()]
            torch._foreach_copy_(list(self._buffers.values()), shown)

    def take_made(self) -> int | None:
        """Returns the descriptor of the last new image once. The caller closes it."""
        made, self._made = self._made, None
        return made

    def _show_fresh(self) -> None:
        fd = self._memory.allocate(self.mapped_bytes)
        self._window.show(fd, self.mapped_bytes, is_writable=True)
        self._made = fd

    def _move(self, model: nn.Module, *, copies: bool) -> dict[str, int]:
        """Moves weights, and returns the new offset for each tensor of the model that views them."""
        names = {_address(tensor): name for name, tensor in _weights(model)}
        if copies:
            for name, tensor in _weights(model):
                extent = self._places[name]
                self._base[extent.offset : extent.end].copy_(_bytes_of(tensor))
        for tensor in _viewers(names):
            tensor.data = self._view(names[_address(tensor)], tensor)
        return {
            name: tensor.data_ptr() for name, tensor in _tensors(model) if _address(tensor) == self._base.data_ptr()
        }

    def _view(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Returns a view of the image like `like`, which views the storage of this name."""
        offset = self._places[name].offset // like.element_size()
        offset += like.storage_offset() if name not in self._buffers else 0
        view = torch.empty(0, dtype=like.dtype, device=like.device)
        return view.set_(self._base.untyped_storage(), offset, like.size(), like.stride())


def _layout(model: nn.Module) -> Header:
    """Makes the layout, with one entry for each storage: the tensor that covers it, if there is one, else bytes."""
    shapes = [_shape(name, tensor, tensor.untyped_storage().nbytes()) for name, tensor in _weights(model)]
    shapes += [_shape(name, buffer, buffer.nbytes) for name, buffer in _buffers(model)]
    return Header(arrange(shapes), {"format": "pt"})


def _shape(name: str, tensor: torch.Tensor, size_bytes: int) -> Shape:
    if tensor.is_contiguous() and tensor.nbytes == size_bytes:
        return Shape(name, dtype_name(tensor.dtype), tuple(tensor.shape), size_bytes)
    return Shape(name, "U8", (size_bytes,), size_bytes)


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields one tensor for each storage with weights, with its first name."""
    seen: set[int] = set()
    for name, tensor in _tensors(model):
        if _address(tensor) not in seen:
            seen.add(_address(tensor))
            yield name, tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and plain tensors of modules, shared ones under all their names."""
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name, tensor in {**module._parameters, **plain}.items():
            if tensor is None or tensor.device.type == "meta" or not tensor.untyped_storage().nbytes():
                continue
            if _is_on(tensor, model):
                yield f"{path}.{name}" if path else name, tensor


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields buffers that may be in a checkpoint. Others, computed from the configuration, are equal for all models."""
    weights = {_address(tensor) for _, tensor in _weights(model)}
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.nbytes and _address(buffer) not in weights:
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


def _is_on(tensor: torch.Tensor, model: nn.Module) -> bool:
    """Tells whether a tensor is on the model's device, because a few scalars may be on the CPU."""
    return bool(tensor.device == next(model.parameters()).device)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole storage of a tensor as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
