# SPDX-License-Identifier: Apache-2.0
"""Combines a base in the store and an adapter to one source, which is then converted like any other.

Tensors that the adapter does not change are in the base's file, whole tensors of the adapter in its own, and merged
tensors in a file that lora/worker.py fills. The adapter is merged at conversion, not applied at every load: such a
model is an ordinary checkpoint, which loads at the disk's speed, can be rebound, and no longer needs its base.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashd.checkpoint import header
from flashd.checkpoint.files import Checkpoint, verify
from flashd.checkpoint.lora import source as adapter
from flashd.checkpoint.lora.source import Change, Plan
from flashd.checkpoint.manifest import architecture_of, read_config
from flashd.checkpoint.source import sandboxed_process
from flashd.checkpoint.source.pickles import Converter, SourceTensor
from flashd.checkpoint.source.reader import (
    ADAPTER,
    CONFIG,
    Source,
    SourceFiles,
    is_adapter,
    matches,
    read_source,
    read_whole,
    with_config,
)
from flashd.checkpoint.source.ties import find_ties
from flashd.errors import InvalidSource
from flashd.io.streamer import Extent, OpenFile

# The files of a tokenizer belong together: those of two tokenizers must not be mixed.
TOKENIZER_FILES = (
    "tokenizer*", "*.tiktoken", "spiece.model", "sentencepiece*.model", "spm*.model", "*.spm", "vocab.*", "merges.txt",
    "bpe.codes", "special_tokens_map.json", "added_tokens.json", "tekken.json", "chat_template.*",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer*.model", "*.tiktoken", "spiece.model", "vocab.*", "tekken.json")
_OUTPUT = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
# The slowest known machine computes 1 GFLOP/s in float32, and moves 20 MB/s through Python.
_CPU_S_PER_FLOP = 1 / 1e9
_CPU_S_PER_BYTE = 1 / 20e6
_MOST_THREADS = 16
MATCHING_S = 5  # CPU time for all patterns of ranks and alphas; a thousand take a tenth of a second

Progress = Callable[[int, int], None]


def base_of(files: SourceFiles) -> str | None:
    """Returns the base that an adapter names, perhaps empty; None for a model that is whole. Raises InvalidSource."""
    if not is_adapter(files):
        return None
    return adapter.parse_config(read_whole(files[ADAPTER])).base


def adapted_source(
    files: SourceFiles,
    base: Checkpoint,
    *,
    python: str,
    scratch: Path,
    on_progress: Progress,
    cancelled: Callable[[], bool],
) -> Source:
    """Makes a source of the base with the adapter merged into it.

    Raises InvalidSource if it cannot be merged exactly, CorruptCheckpoint if the base is damaged, Unavailable without
    torch, StoreFull or Cancelled.
    """
    config = adapter.parse_config(read_whole(files[ADAPTER]))
    if base.manifest.quantization:
        what = f"the base is quantised ({base.manifest.quantization}), so an adapter cannot be merged into it exactly"
        raise InvalidSource(what, hint="pull the unquantised base")
    opening = contextlib.ExitStack()
    with opening:
        own = opening.enter_context(
            contextlib.closing(read_source(files, Converter(python=python, scratch=scratch, cancelled=cancelled)))
        )
        weights = _opened(base.weights_path, opening)
        found = base.header()
        tensors = [
            SourceTensor(t.name, t.dtype, t.shape, 0, _shifted(t.extent, found.data_offset)) for t in found.tensors
        ]
        base.check_side_files()
        sides = {name: _opened(path, opening) for name, path in base.side_files().items()}
        base_config = read_config(read_whole(sides[CONFIG])) if CONFIG in sides else {}
        aliases = header.aliases(found, str(base.weights_path))
        implied = _implied_tie({tensor.name for tensor in tensors} | aliases.keys(), base_config)
        plan = adapter.make_plan(
            config,
            [replace(tensor, file=tensor.file + 1) for tensor in own.tensors],
            tensors,
            {**implied, **aliases},
            vocabulary=_vocabulary(base_config),
        )
        stored_bytes, changed_bytes = base.manifest.data_bytes, sum(change.size_bytes for change in plan.changes)
        # The base is compared with its digests first, because it is written again under new ones.
        verify(base, on_progress=lambda done, _: on_progress(done, stored_bytes + changed_bytes), cancelled=cancelled)
        spill = OpenFile(_scratch_file(scratch, opening), "the merged weights")
        inputs = (weights, *own.files)
        _merge(
            plan, config.scaling, inputs, spill, python=python, scratch=scratch, cancelled=cancelled,
            on_progress=lambda done: on_progress(stored_bytes + done, stored_bytes + changed_bytes),
        )  # fmt: skip
        source = Source(
            files=(*inputs, spill),
            tensors=(*plan.kept, *_where_merged(plan, len(inputs))),
            aliases={alias: name for alias, name in plan.aliases.items() if alias not in implied},
            metadata={key: value for key, value in found.metadata.items() if key != header.ALIASES},
            side_files=_side_files(sides, own.side_files),
            made=opening.pop_all(),
        )
    return _with_config(source, base_config, plan, cancelled)


def _merge(
    plan: Plan,
    scaling: Mapping[str, object],
    inputs: tuple[OpenFile, ...],
    spill: OpenFile,
    *,
    python: str,
    scratch: Path,
    cancelled: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> None:
    if not plan.changes:
        return
    factors = [tensor for change in plan.changes for tensor in (change.a, change.b) if tensor is not None]
    largest_bytes = max((tensor.extent.length for tensor in factors), default=0)
    moved_bytes = sum(change.size_bytes + change.start.extent.length for change in plan.changes)
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    fds = sorted({file.fd for file in inputs})
    with tempfile.TemporaryFile(dir=scratch) as described:
        described.write(_as_json(plan, scaling, inputs))
        described.flush()
        described.seek(0)
        limits = {
            "address_space_bytes": sandboxed_process.BASE_ADDRESS_SPACE_BYTES,
            "memory_bytes": sandboxed_process.BASE_MEMORY_BYTES + 16 * largest_bytes,
            # Threads consume CPU time while they wait for each other.
            "cpu_s": sandboxed_process.BASE_CPU_S
            + threads * int(_flops(plan) * _CPU_S_PER_FLOP + moved_bytes * _CPU_S_PER_BYTE),
            "file_bytes": sum(change.size_bytes for change in plan.changes),
            "open_files": max(*fds, spill.fd, described.fileno()) + 64,
        }
        outcome = sandboxed_process.run(
            python,
            "flashd.checkpoint.lora.worker",
            [str(described.fileno()), str(spill.fd), json.dumps(limits), str(MATCHING_S)],
            (*fds, spill.fd, described.fileno()),
            what="merging an adapter needs torch",
            scratch=scratch,
            cancelled=cancelled,
            threads=threads,
            on_tick=lambda: on_progress(os.fstat(spill.fd).st_size),
        )
    if outcome.status == -signal.SIGVTALRM:
        what = f"the patterns in {ADAPTER} take longer than {MATCHING_S} s to match with its modules"
        raise InvalidSource(what, hint="write rank_pattern and alpha_pattern with the plain names of modules")
    if outcome.status != 0:
        raise InvalidSource(f"the adapter could not be merged: {outcome.reason}")
    if os.fstat(spill.fd).st_size != sum(change.size_bytes for change in plan.changes):
        raise InvalidSource("the adapter could not be merged: the result has the wrong size")


def _as_json(plan: Plan, scaling: Mapping[str, object], inputs: tuple[OpenFile, ...]) -> bytes:
    def described(tensor: SourceTensor | None) -> Mapping[str, object] | None:
        if tensor is None:
            return None
        place = {"fd": inputs[tensor.file].fd, "offset": tensor.extent.offset}
        return {**place, "dtype": tensor.dtype, "shape": tensor.shape}

    changes = [
        {"module": change.module, "kind": change.kind, "dtype": change.dtype, "start": described(change.start),
         "a": described(change.a), "b": described(change.b)}
        for change in plan.changes
    ]  # fmt: skip
    return json.dumps({"scaling": scaling, "changes": changes}).encode()


def _flops(plan: Plan) -> int:
    return sum(2 * change.size_bytes * change.a.shape[0] for change in plan.changes if change.a)


def _where_merged(plan: Plan, file: int) -> list[SourceTensor]:
    placed, offset = [], 0
    for change in plan.changes:
        placed.append(_at(change, file, offset))
        offset += change.size_bytes
    return placed


def _at(change: Change, file: int, offset: int) -> SourceTensor:
    return SourceTensor(change.name, change.dtype, change.start.shape, file, Extent(offset, change.size_bytes))


def _side_files(base: Mapping[str, OpenFile], own: Mapping[str, OpenFile]) -> Mapping[str, OpenFile]:
    """Returns the side files: the base's, except for the tokenizer if the adapter brings its own."""
    if any(matches(name, _VOCABULARIES) for name in own):
        base = {name: file for name, file in base.items() if not matches(name, TOKENIZER_FILES)}
    return {**base, **{name: file for name, file in own.items() if name != CONFIG}}


def _vocabulary(config: Mapping[str, object]) -> int | None:
    for section in (config.get("text_config"), config):
        if isinstance(section, dict) and type(size := section.get("vocab_size")) is int:
            return size
    return None


def _implied_tie(names: Collection[str], config: Mapping[str, object]) -> Mapping[str, str]:
    """Returns the output layer's alias of the input embedding, if only one is stored and transformers ties them."""
    sections = [section for section in (config.get("text_config"), config) if isinstance(section, dict)]
    said = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section]
    has_head = "ForCausalLM" in architecture_of(config) or "ForConditionalGeneration" in architecture_of(config)
    inputs = [name for name in names if name.endswith(_INPUT_EMBEDDINGS)]
    is_tied = not any(name.endswith(_OUTPUT) for name in names) and (said[-1] if said else has_head)
    return {_OUTPUT: inputs[0]} if is_tied and len(inputs) == 1 else {}


def _with_config(source: Source, config: dict[str, Any], plan: Plan, cancelled: Callable[[], bool]) -> Source:
    """Returns the source with the adapter's changes of the base's configuration, if any."""
    try:
        is_untied = bool(plan.untied.keys() - find_ties(source, cancelled).keys()) if plan.untied else False
        if not config or not (is_untied or plan.vocabulary):
            return source
        for section in (config, *(part for part in [config.get("text_config")] if isinstance(part, dict))):
            if is_untied and (section is config or "tie_word_embeddings" in section):
                section["tie_word_embeddings"] = False
            if plan.vocabulary and "vocab_size" in section:
                section["vocab_size"] = plan.vocabulary
        return with_config(source, config)
    except BaseException:
        source.close()
        raise


def _shifted(extent: Extent, by: int) -> Extent:
    return Extent(extent.offset + by, extent.length)


def _opened(path: Path, opening: contextlib.ExitStack) -> OpenFile:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    opening.callback(os.close, fd)
    return OpenFile(fd, str(path))


def _scratch_file(scratch: Path, opening: contextlib.ExitStack) -> int:
    with tempfile.TemporaryFile(dir=scratch) as file:
        fd = os.dup(file.fileno())
    opening.callback(os.close, fd)
    return fd
