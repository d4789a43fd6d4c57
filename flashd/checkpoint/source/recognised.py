# SPDX-License-Identifier: Apache-2.0
"""Recognises unsupported models and other files in place of models, to refuse them with helpful errors.

They are recognised by names, sizes and first bytes only. Other files are left to the reader of their format, whose
errors are less helpful.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from flashd.checkpoint.lora.source import unquantised
from flashd.checkpoint.source.debris import is_debris
from flashd.errors import InvalidSource, TransferFailed
from flashd.io.streamer import OpenFile

_HEAD_BYTES = 512
_AS_SAFETENSORS = "use the same model as safetensors, as published by its maker: flash pull OWNER/NAME"
_FETCH_AGAIN = "the download has failed: repeat it, logged in if its owner requires that (hf auth login)"
_COPY_AGAIN = "a copy or download was interrupted: copy or download it again"
_UNPACK = "unpack it, and drop the folder of the model that is in it"
_LFS = b"version https://git-lfs.github.com/spec/"
_WHOLE_FOLDERS = ("snapshots", "blobs")  # of a model in huggingface_hub's cache
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_IN_CACHE = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True, slots=True)
class Form:
    """An unsupported form of model: the names by which it is recognised, its description, and a remedy."""

    names: tuple[str, ...]
    what: str
    hint: str = _AS_SAFETENSORS


# Folders that are refused as a whole; no part of them is a separate model.
_DIFFUSERS = Form(
    ("model_index.json",),
    "this is a pipeline of diffusers for images, video or sound, not a language model",
    "use it with diffusers itself",
)
_CACHE = Form(
    (),
    "this is a folder of the Hugging Face cache, in which the files of a model are links",
    "use flash pull OWNER/NAME, which reads the cache, or copy the targets: cp -rL FOLDER/snapshots/COMMIT NAME",
)
# In the order in which they are checked, the most informative first.
_FORMS = (
    Form(
        ("*.ggml", "ggml-*.bin", "*.llamafile"),
        "this is a model in a former format of llama.cpp's, which no engine here can read",
        "use the same model as GGUF, or as safetensors: flash pull OWNER/NAME",
    ),
    Form(("*.onnx", "*.onnx_data", "*.onnx.data"), "this is a model for ONNX Runtime, which no engine here can read"),
    Form(("weights.npz", "weights.*.npz"), "these are weights for MLX, which no engine here can read"),
    Form(
        ("*.h5", "*.hdf5", "*.keras", "tf_model*", "saved_model.pb", "*.ckpt.index", "*.ckpt.meta", "*.data-0*-of-0*"),
        "this is a model for TensorFlow or Keras, which no engine here can read",
    ),
    Form(("*.msgpack", "*.msgpack.index.json"), "this is a model for Flax, which no engine here can read"),
    Form(("*.tflite", "*.litertlm", "*.task"), "this is a model for TensorFlow Lite, which no engine here can read"),
    Form(("*.mlmodel", "*.mlpackage", "*.mlmodelc"), "this is a model for Core ML, which no engine here can read"),
    Form(("openvino_*",), "this is a model for OpenVINO, which no engine here can read"),
    Form(("*.engine", "*.plan"), "this is an engine of TensorRT, which no engine here can read"),
    Form(("*.pdparams", "*.pdmodel"), "this is a model for Paddle, which no engine here can read"),
    Form(("rust_model.ot",), "this is a model for rust-bert, which no engine here can read"),
    Form(
        ("*.nemo",),
        "this is an archive of NVIDIA NeMo's, which no engine here can read",
        "convert it to Hugging Face's format with NeMo's own scripts, and drop the folder that they write",
    ),
    Form(
        ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.txz", "*.7z", "*.rar", "*.gz", "*.zst", "*.xz", "*.bz2"),
        "this is an archive, which is not unpacked",
        _UNPACK,
    ),
    Form(
        ("optimizer*", "scheduler*", "rng_state*", "scaler*", "training_args.bin", "trainer_state.json"),
        "this is the state of a training, without the weights of a model",
        "drop the folder that the trainer saved the model in (trainer.save_model)",
    ),
    Form(
        ("adapter_model.*",),
        "these are the weights of an adapter, without the adapter_config.json that names its base",
        "copy all files of the adapter as saved by PEFT",
    ),
    Form(
        ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf"),
        "weights are found by names in lower case, such as model.safetensors",
        "rename the file",
    ),
)
FOREIGN = tuple(name for form in _FORMS for name in form.names)
# Pickles by their names, but no files of PyTorch's.
NOT_PICKLES = ("ggml-*.bin", "openvino_*", "training_args.bin")


def is_one_thing(names: Collection[str]) -> bool:
    """Tells whether a folder with these names is refused as a whole, so that no part of it is taken for a model."""
    return _whole(names) is not None


def is_foreign(names: Iterable[str]) -> bool:
    """Tells whether one of these names is that of an unsupported model."""
    return any(_matches(name, FOREIGN) for name in names)


def check_one_thing(names: Collection[str], folder: str = "") -> None:
    """Refuses folders that are not a model as a whole, even if they contain weights. Raises InvalidSource."""
    form = _whole(names)
    if form is _CACHE and (match := _IN_CACHE.fullmatch(folder.rstrip("/").rpartition("/")[2])):
        hint = form.hint.replace("OWNER/NAME", f"{match[1]}/{match[2]}").replace("NAME", match[2])
        raise InvalidSource(form.what, hint=hint)
    if form is not None:
        raise InvalidSource(form.what, hint=form.hint)


def check_names(names: Collection[str]) -> None:
    """Recognises folders without weights by their names. Raises InvalidSource with an explanation."""
    for form in _FORMS:
        if any(_matches(name, form.names) for name in names):
            raise InvalidSource(form.what, hint=form.hint)


def check_weights(file: OpenFile, *, pickle: bool) -> None:
    """Refuses a file that is named like weights, but begins like another format. Raises InvalidSource."""
    size_bytes, head = _beginning(file)
    found = _of_any_file(head, size_bytes) or _of_weights(head, size_bytes, pickle=pickle)
    if found is not None:
        what, hint = found
        raise InvalidSource(f"{file.path} {what}", hint=hint)


def check_small_file(file: OpenFile, name: str) -> None:
    """Refuses a side file that is only a placeholder. Raises InvalidSource."""
    size_bytes, head = _beginning(file)
    found = _of_any_file(head, size_bytes) if not name.endswith(".jinja") else _pointer(head)
    if found is not None and (size_bytes or not name.endswith((".txt", ".jinja"))):
        what, hint = found
        raise InvalidSource(f"{file.path} {what}", hint=hint)


def check_quantization(config: Mapping[str, object]) -> None:
    """Refuses weights in quantised layouts that only other programs can read. Raises InvalidSource."""
    said = config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and {"group_size", "bits"} <= mlx.keys() and "quant_method" not in said:
        what = "these weights are in MLX's quantised layout, for Apple's processors, and no engine here can read them"
        raise InvalidSource(what, hint=_AS_SAFETENSORS)
    if said.get("quant_method") == "bitsandbytes" or said.get("load_in_4bit") is True:
        what = "these weights are quantised by bitsandbytes, and no engine here can read them"
        raise InvalidSource(what, hint=f"pull the original model: flash pull {_original(config)}")
    if said.get("quant_method") in ("exl2", "exl3"):  # a list has no place in a set
        what = "these weights are quantised for ExLlama, and no engine here can read them"
        raise InvalidSource(what, hint=_AS_SAFETENSORS)


def _original(config: Mapping[str, object]) -> str:
    """Returns the hub's name of the original model, if config.json tells it."""
    name = config.get("_name_or_path")
    is_name = isinstance(name, str) and _HUB_NAME.fullmatch(name)
    return unquantised(str(name)) if is_name else "OWNER/NAME, without -bnb-4bit at the end of the name"


def _whole(names: Collection[str]) -> Form | None:
    if "model_index.json" in names:
        return _DIFFUSERS
    return _CACHE if set(names) >= set(_WHOLE_FOLDERS) else None


def _beginning(file: OpenFile) -> tuple[int, bytes]:
    try:
        return os.fstat(file.fd).st_size, os.pread(file.fd, _HEAD_BYTES, 0)
    except OSError as error:
        raise TransferFailed(f"read {file.path}: {error.strerror}") from None


def _pointer(head: bytes) -> tuple[str, str] | None:
    if head.startswith(_LFS):
        hint = "run: git lfs pull, in the clone; or: flash pull OWNER/NAME"
        return "is a git-lfs pointer instead of the file itself", hint
    return None


def _of_any_file(head: bytes, size_bytes: int) -> tuple[str, str] | None:
    """Explains what is wrong with a file that begins with these bytes, with a remedy."""
    if not size_bytes:
        return "is empty", _COPY_AGAIN
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page instead of the file itself", _FETCH_AGAIN
    return _pointer(head)


# First bytes, what they belong to, and what to do.
_MAGICS = (
    ((b"GGUF",), "is a GGUF file", "give it the ending .gguf"),
    ((b"lmgg", b"tjgg", b"fmgg"), "is in a former format of llama.cpp's", _AS_SAFETENSORS),
    ((b"\x89HDF\r\n\x1a\n",), "is a file for Keras or TensorFlow", _AS_SAFETENSORS),
    (
        (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a", b"\xfd7zXZ", b"BZh"),
        "is an archive, which is not unpacked",
        _UNPACK,
    ),
)  # fmt: skip
_PICKLED = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


def _of_weights(head: bytes, size_bytes: int, *, pickle: bool) -> tuple[str, str] | None:
    if not any(head):
        return "begins with zeros: it was allocated, but not written", _COPY_AGAIN
    for magics, what, hint in _MAGICS:
        if head.startswith(magics):
            return what, hint
    if size_bytes <= _HEAD_BYTES and len(head) > 8 and (said := head.strip()) and said.isascii():
        text = said.decode()
        if all(c.isprintable() or c.isspace() for c in text):
            return f"holds no weights, but the text {' '.join(text.split())[:80]!r}", _FETCH_AGAIN
    if pickle and int.from_bytes(head[:8], "little") < size_bytes and head[8:9] == b"{":
        return "is a safetensors file", "give it the ending .safetensors"
    if not pickle and head.startswith((b"PK\x03\x04", *_PICKLED)) and head[8:9] != b"{":
        return "is a file of PyTorch's or an archive, not a safetensors file", "if torch saved it, call it .bin"
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    lower = name.lower()
    return not is_debris(name) and any(fnmatch.fnmatchcase(lower, pattern) for pattern in patterns)
