# SPDX-License-Identifier: Apache-2.0
"""What is an engine given to run a model, and where is room for it?

An engine that works in host memory is given the checkpoint there. One on a GPU is given the image that its build once
made of the checkpoint, on that GPU, to be mapped as it is. If there is none yet it is given the checkpoint, and room is
claimed for the image that it makes then; what it makes is ours from there on. Besides, room is claimed for what a
serving engine needs for itself. Nothing moves before there is room for all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.engine import NO_OPTIONS, Binding, EngineFactory, EngineOptions, GpuPlan, Made
from flashd.errors import CorruptCheckpoint, FlashdError
from flashd.memory.device import HOST, Tier
from flashd.memory.moving import Progress
from flashd.memory.place import Hold, Place
from flashd.memory.pool import Reservation
from flashd.memory.residency import Residency

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a swap wants, the kind of engine, and what that is told. `names` are what requests may call it.

    One that is `private_to` a user has engines of its own: nobody else's connection leads to them.
    """

    model_name: str
    names: tuple[str, ...]
    checkpoint: Checkpoint
    engine_kind: str
    private_to: int | None = None
    options: EngineOptions = NO_OPTIONS

    def is_same(self, other: Target) -> bool:
        return self._identity() == other._identity()

    def _identity(self) -> tuple[object, ...]:
        return (self.model_name, self.names, self.checkpoint.id, self.engine_kind, self.private_to, self.options)


class Images(Protocol):
    """Which images there are (flashd/store/images.py)."""

    def get(self, key: str) -> Checkpoint | None: ...

    def is_stored(self, key: str) -> bool: ...

    def layout_json(self, image: Checkpoint) -> str: ...

    def describe(self, key: str, layout: str, data_bytes: int, made_of: str) -> Checkpoint: ...

    def drop(self, key: str) -> None: ...


class Supply:
    """What one engine was given, held until `release`.

    `room` is claimed for its weights until they are an image of ours, `working` for what it needs besides.
    """

    def __init__(self, plan: GpuPlan | None, hold: Hold, layout: str = "", claims: Sequence[Reservation] = ()) -> None:
        """`layout` is the image's; empty if it is the checkpoint. `claims` are released with it."""
        self.plan = plan
        self.hold = hold
        self.layout = layout
        self.from_tier: Tier = hold.from_tier
        self._claims = list(claims)

    @property
    def is_image(self) -> bool:
        return bool(self.layout)

    def became(self, hold: Hold, layout: str) -> None:
        """It is an image from here on, in what was the room for one."""
        self._claims.remove(self.room)
        self.hold.release()
        self.hold, self.layout = hold, layout

    @property
    def room(self) -> Reservation:
        """What was claimed last: for the image to come."""
        return self._claims[-1]

    def release(self) -> None:
        self.hold.release()
        for claim in self._claims:
            claim.release()
        self._claims.clear()

    def given_up_bytes(self, place: Place) -> int:
        """What would be free on a device without it."""
        held_bytes = place.given_up_bytes(self.hold) if self.hold.place is place else 0
        claimed_bytes = sum(claim.size_bytes for claim in self._claims)
        return held_bytes + (claimed_bytes if self.plan is not None and self.plan.device == place.name else 0)


class Supplier:
    """All calls on one event loop."""

    def __init__(
        self,
        residency: Residency,
        factories: Mapping[str, EngineFactory],
        images: Images,
        *,
        on_made: Callable[[Checkpoint, Place], None] = lambda image, place: None,
    ) -> None:
        """`on_made` hears of images that are on a device, and nowhere else yet."""
        self._residency = residency
        self._factories = factories
        self._images = images
        self._on_made = on_made

    async def provide(self, target: Target, on_progress: Progress = lambda done, total: None) -> Supply:
        """Raises OutOfMemory and whatever a load raises; then nothing is held. Cancelling it is safe."""
        plan = await self._plan(target)
        if plan is None:
            return Supply(None, await self._residency.acquire(target.checkpoint, on_progress))
        place = self._residency.place(plan.device)
        with ExitStack() as on_error:
            claims = [await place.claim(plan.working_bytes)]
            on_error.callback(claims[0].release)
            image = await self._image(plan)
            if image is None:
                claims.append(await place.claim(plan.weights_bytes))
                on_error.callback(claims[1].release)
                supply = Supply(plan, await self._residency.acquire(target.checkpoint, on_progress), claims=claims)
            else:
                layout = await asyncio.to_thread(self._images.layout_json, image)
                hold = await self._residency.acquire(image, on_progress, device=plan.device)
                supply = Supply(plan, hold, layout, claims)
            on_error.pop_all()
            return supply

    async def form(self, target: Target) -> Checkpoint:
        """What to bring into memory now for a swap later: its image if there is one for such an engine."""
        with contextlib.suppress(FlashdError):  # no such engine can be started; whoever swaps is told
            plan = await self._plan(target)
            if plan is not None and (image := await self._image(plan)) is not None:
                return image
        return target.checkpoint

    async def fits_without(self, target: Target, old: Supply) -> bool:
        """Whether there would be room for a model if what another engine was given were given up."""
        return all(
            size_bytes <= place.pool.budget_bytes - place.fixed_bytes() + old.given_up_bytes(place)
            for place, size_bytes in (await self._needed_bytes(target)).items()
        )

    async def fits_beside(self, target: Target) -> bool:
        """Whether there is room for a model without anything making way."""
        needed_bytes = await self._needed_bytes(target)
        return all(size_bytes <= place.pool.free_bytes for place, size_bytes in needed_bytes.items())

    async def _needed_bytes(self, target: Target) -> dict[Place, int]:
        plan = await self._plan(target)
        needed_bytes: dict[Place, int] = {}

        def need(place: Place, size_bytes: int) -> None:
            needed_bytes[place] = needed_bytes.get(place, 0) + size_bytes

        image = await self._image(plan) if plan else None
        if image is None:
            host = self._residency.place(HOST)
            need(host, host.missing_bytes(target.checkpoint))
        if plan is not None:
            place = self._residency.place(plan.device)
            need(place, plan.working_bytes + (place.missing_bytes(image) if image else plan.weights_bytes))
        return needed_bytes

    async def binding(self, target: Target, supply: Supply) -> Binding:
        """What an engine is told of it."""
        checkpoint, plan = target.checkpoint, supply.plan
        return Binding(
            model_name=target.model_name,
            names=target.names,
            checkpoint_id=checkpoint.id,
            architecture_key=checkpoint.manifest.architecture_key,
            arena_fd=supply.hold.arena.fd,
            arena_bytes=supply.hold.arena.size_bytes,
            layout=supply.layout or await asyncio.to_thread(checkpoint.layout_json),
            side_files=checkpoint.side_files(),
            device=plan.device if plan else "",
            is_image=supply.is_image,
            wants_image=bool(plan and plan.key and not supply.is_image),
        )

    async def take_in(self, target: Target, supply: Supply, made: Made) -> None:
        """The image that an engine has made of what it was given is ours from here on, and what it holds.

        An image that makes no sense is not kept, and the engine keeps what it was given. Raises nothing.
        """
        plan = supply.plan
        if plan is None or supply.is_image:
            os.close(made.fd)
            return
        place = self._residency.place(plan.device)
        try:
            arena = await asyncio.to_thread(place.device.adopt, made.fd, made.size_bytes)
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            return
        try:
            image = self._images.describe(plan.key, made.layout, made.size_bytes, target.checkpoint.id)
            hold = place.admit(image, arena, supply.room)
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            self._images.drop(plan.key)
            arena.close()
            return
        supply.became(hold, made.layout)
        self._on_made(image, place)

    async def _plan(self, target: Target) -> GpuPlan | None:
        return await self._factories[target.engine_kind].gpu_plan(target.checkpoint, target.options)

    async def _image(self, plan: GpuPlan) -> Checkpoint | None:
        """The image of a plan, if some memory or the disk has it."""
        image = await asyncio.to_thread(self._images.get, plan.key) if plan.key else None
        if image is None or self._residency.devices_of(image.id):
            return image
        if not self._images.is_stored(plan.key):
            return None  # it was not written before the last arena went
        try:
            await asyncio.to_thread(image.digests)
        except CorruptCheckpoint as error:
            log.warning("%s, so it is made again", error.message)
            self._images.drop(plan.key)
            return None
        return image
