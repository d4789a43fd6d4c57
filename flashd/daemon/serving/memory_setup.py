# SPDX-License-Identifier: Apache-2.0
"""Creates the machine's devices and the streamer according to the configuration."""

from __future__ import annotations

import dataclasses
import logging

from flashd.checkpoint.files import Checkpoint
from flashd.config.settings import Config, MemoryConfig
from flashd.daemon.lifecycle.journal import fields
from flashd.daemon.lifecycle.stall_detector import StallDetector
from flashd.io import cuda
from flashd.io.streamer import Backend, Options, TransferResult
from flashd.memory.device import CudaDevice, Device, HostDevice, Kind, simulated_device, usable
from flashd.memory.residency import Memory
from flashd.units import format_bytes

log = logging.getLogger(__name__)


def streamer_options(config: Config, stalls: StallDetector) -> Options:
    chosen = config.streamer
    return Options(
        block_bytes=chosen.block_bytes,
        depth=chosen.depth,
        backend=Backend(chosen.backend),
        direct=chosen.direct,
        on_start=stalls.started,
    )


def memories(config: MemoryConfig) -> list[Memory]:
    """Returns the machine's devices, the host first, with the budgets for weights."""
    host = HostDevice.probe(use_huge_pages=config.huge_pages == "auto")
    gpus = usable(cuda.gpus())
    unified = next(
        (gpu for gpu in gpus if config.unified is True or (config.unified == "auto" and gpu.is_unified)), None
    )
    host = dataclasses.replace(host, registers_read_only=all(gpu.registers_read_only for gpu in gpus))
    if unified:
        host = dataclasses.replace(host, kind=Kind.UNIFIED, gpu=unified)
    found = [Memory(host, config.host_budget_bytes or host.default_budget_bytes())]
    cards: list[Device] = [CudaDevice(gpu, config.device_reserve_bytes) for gpu in gpus if not unified]
    if config.simulated_device_bytes:
        cards.append(simulated_device(config.simulated_device_bytes, host))
    return found + [Memory(card, config.device_budget_bytes or card.default_budget_bytes()) for card in cards]


def log_load(checkpoint: Checkpoint, result: TransferResult) -> None:
    rate = result.size_bytes / max(result.seconds, 1e-9) / 1e9
    how = f"{result.backend}, {'direct' if result.direct else 'buffered'}"
    fallback = f"; {result.fallback}" if result.fallback else ""
    log.info(
        "loaded %s, %s at %.2f GB/s (%s%s)",
        checkpoint.id[:12],
        format_bytes(result.size_bytes),
        rate,
        how,
        fallback,
        extra=fields(size_bytes=result.size_bytes, seconds=result.seconds),
    )
