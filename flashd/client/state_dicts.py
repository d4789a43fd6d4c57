# SPDX-License-Identifier: Apache-2.0
"""Saves dictionaries of torch tensors as checkpoints, and loads them again, bit for bit.

Neither direction needs a daemon. If a daemon holds the same checkpoint in memory, tensors are loaded from there.

Saved are the exact value of every element, for all strides, dtypes and devices, and which names share a tensor. Not
saved are strides (tensors come back contiguous), overlaps of different views (each becomes a separate tensor),
requires_grad, and the order of the names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from flashd import tensors
from flashd.checkpoint import save as saving
from flashd.checkpoint.files import MANIFEST, Checkpoint
from flashd.checkpoint.header import Header, check_name
from flashd.checkpoint.layout import Shape
from flashd.errors import DeviceFailed, FlashdError, InvalidArgument, InvalidSource, NotFound, Unsupported
from flashd.io import cuda
from flashd.io.streamer import Extent, OpenFile, Read, Staging, Transfer, load, load_device
from flashd.units import MiB

if TYPE_CHECKING:
    import torch

# As in accelerate and transformers: device of the tensors whose names have a prefix; "" is the prefix of all names.
Device: TypeAlias = "int | str | torch.device"
DeviceMap: TypeAlias = "Mapping[str, Device] | Device | None"

log = logging.getLogger(__name__)

_STAGING_BYTES = 64 * MiB
_SAME_WIDTH = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def save_dict(state_dict: Mapping[str, torch.Tensor], model_path: str | os.PathLike[str]) -> None:
    """Saves tensors as the checkpoint folder `model_path`, which may replace a checkpoint. Needs no daemon.

    Tensors may be on any device and have any strides and dtype. A tensor with several names is stored once. Raises
    Unsupported for anything but dense tensors with contents (sparse, quantised by torch, meta), AlreadyExists if the
    path exists and is not a checkpoint, StoreFull or TransferFailed. After an error nothing has changed.
    """
    destination = Path(model_path).resolve()  # the target of a link is replaced, not the link
    plain = {name: _checked(name, tensor, destination) for name, tensor in state_dict.items()}
    aliases = _aliases(plain)
    kept = {name: tensor for name, tensor in plain.items() if name not in aliases}
    dtypes: dict[str, str] = {}
    shapes = []
    for name, tensor in kept.items():
        called = str(tensor.dtype).removeprefix("torch.")
        if (stand_in := tensors.STAND_INS.get(called)) is not None:
            dtypes[name] = called
        else:
            stand_in = tensors.StandIn(tensors.dtype_name(tensor.dtype))
        shape = (*tensor.shape, *stand_in.shape_suffix)
        shapes.append(Shape(name, stand_in.dtype, shape, tensor.numel() * tensor.element_size()))
    metadata = {tensors.DTYPES_KEY: json.dumps(dict(sorted(dtypes.items())))} if dtypes else {}
    saving.save(shapes, lambda name: _content(kept[name]), destination, aliases=aliases, metadata=metadata)


def load_dict(
    model_path: str | os.PathLike[str],
    device_map: DeviceMap = None,
    storage_path: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Loads the tensors of a checkpoint folder by name, on the CPU or the devices of `device_map`.

    A relative `model_path` counts from `storage_path`, if that is given. `device_map` maps prefixes of names to
    devices, like accelerate's (`{"": 0}`), or is one device for all tensors. A number is an accelerator; on a machine
    without accelerators it means the CPU. Every block is compared with its digest. The tensors belong to the caller,
    who may write to them.

    Raises NotFound, CorruptCheckpoint, InvalidArgument for a map without a device for some tensor, DeviceFailed for a
    missing device, OutOfMemory or TransferFailed.
    """
    loading, found = load_dict_non_blocking(model_path, device_map, storage_path)
    loading.wait()
    return found


def load_dict_non_blocking(
    model_path: str | os.PathLike[str],
    device_map: DeviceMap = None,
    storage_path: str | os.PathLike[str] | None = None,
) -> tuple[Loading, dict[str, torch.Tensor]]:
    """Loads like `load_dict`, without waiting.

    Returns a handle, which flashtensors calls the replica, and the tensors, which have their contents once the handle's
    `wait()` has returned.
    """
    directory = Path(storage_path or "", model_path)
    if not (directory / MANIFEST).is_file():
        hint = "make a checkpoint from tensors with save_dict, or from a model with flash convert"
        raise NotFound(f"{directory} is not a checkpoint", hint=hint)
    checkpoint = Checkpoint.open(directory)
    layout = checkpoint.header()
    placed = _placed(layout, device_map)
    (whole,) = places if len(places := set(placed.values())) == 1 else (None,)
    if (leased := _leased(checkpoint, whole)) is not None:
        return Loading.done(), _moved(leased, placed)
    if whole is not None and whole.type == "cuda" and cuda.gpus():
        loading, base = _to_gpu(checkpoint, whole)
        return loading, _separate(base, layout)
    loading, base = _to_host(checkpoint)
    found = _separate(base, layout)
    if whole is None or whole.type != "cpu":
        return loading, loading.then_moved(found, placed)
    return loading, found


class Loading:
    """A load in progress. Its tensors must not be read before `wait` has returned. Deleting it ends the transfer."""

    def __init__(self, transfer: Transfer | None, held: contextlib.ExitStack) -> None:
        self._transfer = transfer
        self._afterwards: list[Callable[[], object]] = []
        # The disk writes to the tensors' memory until the transfer has ended: `held` keeps the memory and ends the
        # transfer.
        self._finish = weakref.finalize(self, held.close)

    @classmethod
    def done(cls) -> Self:
        return cls(None, contextlib.ExitStack())

    @property
    def finished(self) -> bool:
        """Tells whether `wait` would return or raise at once."""
        return (self._transfer is None or self._transfer.finished) and not self._afterwards

    def wait(self) -> None:
        """Waits until all tensors have their contents. Raises CorruptCheckpoint or TransferFailed."""
        try:
            if self._transfer is not None:
                self._transfer.wait()
            while self._afterwards:
                self._afterwards.pop(0)()
        finally:
            self._transfer = None
            self._afterwards.clear()
            self._finish()

    def then_moved(
        self, found: Mapping[str, torch.Tensor], placed: Mapping[str, torch.device]
    ) -> dict[str, torch.Tensor]:
        """Returns tensors on other devices, which get their contents once these tensors have them."""
        import torch

        moved: dict[str, torch.Tensor] = {}
        by_source: dict[tuple[int, torch.device], torch.Tensor] = {}
        for name, tensor in found.items():
            key = id(tensor), placed[name]
            if key not in by_source:  # tied names keep sharing a tensor
                by_source[key] = tensor if placed[name].type == "cpu" else torch.empty_like(tensor, device=placed[name])
                if by_source[key] is not tensor:
                    self._afterwards.append(lambda to=by_source[key], of=tensor: to.copy_(of))  # type: ignore[misc]
            moved[name] = by_source[key]
        return moved


# -- saving ------------------------------------------------------------------------------------------------------------


def _checked(name: str, tensor: object, path: Path) -> torch.Tensor:
    """Returns the tensor, detached and as a plain Tensor. Raises InvalidArgument or Unsupported for other objects."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        what = f"{name!r} is {type(tensor).__name__}"
        raise InvalidArgument(
            f"{what}; a state dict maps names to tensors", hint="save other state separately, for example as JSON"
        )
    try:
        check_name(name, str(path))
    except InvalidSource as error:
        raise InvalidArgument(error.message) from None
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise Unsupported(f"{name!r} is {tensor.layout}, and only dense tensors can be saved", hint="use to_dense()")
    if is_traceable_wrapper_subclass(tensor):
        hint = "gather, unwrap or dequantise it first"
        raise Unsupported(f"{name!r} is a {type(tensor).__name__}, which has no storage of its own", hint=hint)
    if tensor.is_quantized:
        raise Unsupported(f"{name!r} is quantised by torch", hint="save int_repr(), scales and zero points")
    if tensor.device.type == "meta":
        raise Unsupported(f"{name!r} is on the meta device and has no contents", hint="load the model first")
    return tensor.detach().as_subclass(torch.Tensor)


def _aliases(plain: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Maps the additional names of each tensor to the one it is stored under: same memory, dtype, shape and strides."""
    seen: dict[object, str] = {}
    aliases = {}
    # The last name in order is kept, as in a conversion: for tied embeddings, `model.embed_tokens.weight`.
    for name in sorted(plain, reverse=True):
        tensor = plain[name]
        if tensor.numel():
            place = tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg()
            first = seen.setdefault((*place, tensor.dtype, tensor.shape, tensor.stride()), name)
            if first != name:
                aliases[name] = first
    return aliases


def _content(tensor: torch.Tensor) -> saving.Content:
    """Returns the tensor's bytes in row-major order, copied only if it is not contiguous."""
    import torch

    resolved = tensor.resolve_conj().resolve_neg()
    if (width := _SAME_WIDTH.get(resolved.element_size())) is not None:
        resolved = resolved.view(getattr(torch, width))  # as integers, every dtype can be copied bit for bit
    # A tensor of one element is contiguous with any strides, but a view as bytes requires a stride of 1.
    ordered = resolved.contiguous().as_strided((resolved.numel(),), (1,))
    raw = ordered.view(torch.uint8)

    def fill(offset: int, memory: memoryview) -> None:
        torch.frombuffer(memory, dtype=torch.uint8).copy_(raw[offset : offset + len(memory)])

    return fill


# -- loading -----------------------------------------------------------------------------------------------------------


def _placed(layout: Header, device_map: DeviceMap) -> dict[str, torch.device]:
    """Returns the device of each name. Raises InvalidArgument or DeviceFailed."""
    import torch

    names = [tensor.name for tensor in layout.tensors]
    names += tensors.aliases(layout)
    if not isinstance(device_map, Mapping):
        device_map = {"": "cpu" if device_map is None else device_map}
    devices = {prefix: _device(device) for prefix, device in device_map.items()}
    placed: dict[str, torch.device] = {}
    for name in names:
        prefix = name
        while prefix and prefix not in devices:
            prefix = prefix.rpartition(".")[0]
        if prefix not in devices:
            raise InvalidArgument(
                f"device_map has no device for {name!r}", hint='{"": 0} puts all tensors on the first GPU'
            )
        placed[name] = devices[prefix]
    return placed or {"": torch.device("cpu")}


def _device(wanted: int | str | torch.device) -> torch.device:
    import torch

    if wanted == "auto":
        wanted = 0
    if isinstance(wanted, int) and not torch.accelerator.is_available():
        log.info("this machine has no accelerator: device %d is the CPU", wanted)
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0]
        raise InvalidArgument(f"{wanted!r} is not a device: {reason}", hint="use 0, cuda:0 or cpu") from None
    try:
        return torch.empty(0, device=device).device  # "cuda" alone is the current GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DeviceFailed(f"{device} cannot be used: {reason}", hint="nvidia-smi lists the GPUs") from None


def _leased(checkpoint: Checkpoint, whole: torch.device | None) -> dict[str, torch.Tensor] | None:
    """Returns the tensors from a daemon that has this very checkpoint in memory; None if there is no such daemon."""
    from flashd.client import client as clients

    try:
        with clients.connect(interactive=False, activate=False) as client:
            for model in client.models():
                if model.checkpoint != checkpoint.id or model.residency == "stored":
                    continue
                if whole is not None and str(whole) in model.devices:
                    with client.lease(
                        model.name, str(whole)
                    ) as lease:  # a lease is read-only, and these tensors are to be writable
                        return {name: tensor.clone() for name, tensor in lease.tensors().items()}
                # A private mapping outlives the lease: pages are shared with the daemon until they are written to.
                with client.lease(model.name) as lease:
                    base = tensors.private_bytes_tensor(lease.fd, lease.size_bytes)
                    return _separate(base, lease.layout)
    except FlashdError as error:
        log.debug("not loading from a daemon: %s", error)
    return None


def _moved(found: Mapping[str, torch.Tensor], placed: Mapping[str, torch.device]) -> dict[str, torch.Tensor]:
    done = Loading.done()
    moved = done.then_moved(found, placed)
    done.wait()
    return moved


def _to_host(checkpoint: Checkpoint) -> tuple[Loading, torch.Tensor]:
    import torch

    size_bytes = checkpoint.extent.length
    if not size_bytes:
        return Loading.done(), torch.empty(0, dtype=torch.uint8)
    with tensors.mapping_of(size_bytes):
        memory = mmap.mmap(-1, size_bytes)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    base = tensors.bytes_tensor(memoryview(memory))
    read = [Read(0, checkpoint.extent.offset, 0, size_bytes)]
    mapped_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    with contextlib.ExitStack() as held:
        file = _opened(checkpoint, held)
        held.callback(_keep, base)  # keeps them until the transfer has ended
        transfer = load(
            [file], read, address=base.data_ptr(), size_bytes=mapped_bytes, digests=checkpoint.digests(), populate=True
        )
        held.enter_context(transfer)
        return Loading(transfer, held.pop_all()), base


def _to_gpu(checkpoint: Checkpoint, device: torch.device) -> tuple[Loading, torch.Tensor]:
    """Transfers weights from the file through pinned memory into torch's own memory, without a copy in between."""
    import torch

    base = torch.empty(checkpoint.extent.length, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # earlier work of the GPU on this memory has ended
    if not base.numel():
        return Loading.done(), base
    ordinal = device.index or 0
    cuda.enter(ordinal)
    block_bytes = checkpoint.manifest.digest_block_bytes
    with contextlib.ExitStack() as held:
        file = _opened(checkpoint, held)
        staging = Staging("cuda", cuda.context(ordinal), size_bytes=_STAGING_BYTES, block_bytes=block_bytes)
        held.callback(_keep, base, staging)  # keeps them until the transfer has ended
        transfer = load_device(
            file, checkpoint.extent, target=base.data_ptr(), staging=staging, digests=checkpoint.digests()
        )
        held.enter_context(transfer)
        return Loading(transfer, held.pop_all()), base


def _keep(*_held: object) -> None:
    """Does nothing. As a callback of an exit stack, its arguments live until the stack is closed."""


def _opened(checkpoint: Checkpoint, held: contextlib.ExitStack) -> OpenFile:
    file = held.enter_context(checkpoint.weights_path.open("rb"))
    return OpenFile(file.fileno(), str(checkpoint.weights_path))


def _separate(base: torch.Tensor, layout: Header) -> dict[str, torch.Tensor]:
    """Returns tensors with separate storages, so that torch.save of one tensor does not write its neighbours too."""
    import torch

    storage = base.untyped_storage()

    def place(extent: Extent, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        part = storage[extent.offset : extent.end] if extent.length else torch.UntypedStorage(0, device=base.device)
        raw = torch.empty(0, dtype=torch.uint8, device=base.device).set_(part)
        return raw.view(dtype).view(shape)

    return tensors.named_tensors(layout, place)
