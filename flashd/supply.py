# SPDX-License-Identifier: Apache-2.0
"""What is an engine given to run a model, and where is room for it?

An engine that works in host memory is given the checkpoint there. One on GPUs is given the image that its build once
made of the checkpoint, each rank's part on that rank's GPU, to be mapped as it is. If there is none yet it is given the
checkpoint, and room is claimed for the image that it makes then; what it makes is ours from there on. Besides, room is
claimed for what a serving engine needs for itself. Nothing moves before there is room for all of it, on every device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.control import close_all
from flashd.engines.engine import (
    NO_OPTIONS,
    Binding,
    EngineFactory,
    EngineOptions,
    GpuPlan,
    Made,
    RankArena,
    RankPlan,
)
from flashd.errors import Busy, CorruptCheckpoint, FlashdError, NotFound
from flashd.memory.arena import Arena
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

    `holds` are of the checkpoint, or of its image's parts, one a rank. Of `claims` each rank has one, for what it needs
    besides its weights; `rooms` are for the weights, one a rank, until they are an image of ours; `starts` for what it
    needs on top until it has started.
    """

    def __init__(
        self,
        plan: GpuPlan | None,
        holds: Sequence[Hold],
        layouts: Sequence[str] = (),
        claims: Sequence[Reservation] = (),
        rooms: Sequence[Reservation] = (),
        starts: Sequence[Reservation] = (),
    ) -> None:
        """`layouts` are the image's; empty if it is the checkpoint. All are released with it."""
        self.plan = plan
        self.holds = list(holds)
        self.layouts = list(layouts)
        self.from_tier = min((hold.from_tier for hold in holds), key=list(Tier).index)
        self.rooms = list(rooms)
        self._claims = list(claims)
        self._starts = list(starts)

    @property
    def is_image(self) -> bool:
        return bool(self.layouts)

    @property
    def forms(self) -> tuple[str, ...]:
        """The ids of what is held."""
        return tuple(hold.checkpoint_id for hold in self.holds)

    def became(self, holds: Sequence[Hold], layouts: Sequence[str]) -> None:
        """It is an image from here on, in what were the rooms for one."""
        self.rooms.clear()
        for hold in self.holds:
            hold.release()
        self.holds, self.layouts = list(holds), list(layouts)

    def has_started(self) -> None:
        """The engine serves, and needs no more than what it serves with."""
        for start in self._starts:
            start.release()
        self._starts.clear()

    def release(self) -> None:
        self.has_started()
        for hold in self.holds:
            hold.release()
        for claim in (*self._claims, *self.rooms):
            claim.release()
        self._claims.clear()
        self.rooms.clear()

    def given_up_bytes(self, place: Place) -> int:
        """What would be free on a device without it."""
        held_bytes = sum(place.given_up_bytes(hold) for hold in self.holds if hold.place is place)
        claims = [*self._claims, *self.rooms, *self._starts]
        return held_bytes + sum(claim.size_bytes for claim in claims if claim.pool is place.pool)


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

    async def provide(
        self, target: Target, on_progress: Progress = lambda done, total: None, *, starts: bool = False
    ) -> Supply:
        """`starts` says that an engine is to start with it, which takes more than to go on with one.

        Raises OutOfMemory and whatever a load raises; then nothing is held. Cancelling it is safe.
        """
        plan = await self._plan(target)
        if plan is None:
            return Supply(None, [await self._residency.acquire(target.checkpoint, on_progress)])
        places = [self._residency.place(rank.device) for rank in plan.ranks]
        ranks = list(zip(places, plan.ranks, strict=True))
        images = await self._image(plan)
        with ExitStack() as on_error:

            async def claim(place: Place, size_bytes: int) -> Reservation:
                made = await place.claim(size_bytes)
                on_error.callback(made.release)
                return made

            if not images:
                claims = [await claim(place, rank.working_bytes) for place, rank in ranks]
                rooms = [await claim(place, rank.weights_bytes) for place, rank in ranks]
                besides = [await claim(place, rank.starting_bytes) for place, rank in ranks] if starts else []
                hold = await self._residency.acquire(target.checkpoint, on_progress)
                supply = Supply(plan, [hold], claims=claims, rooms=rooms, starts=besides)
            else:
                layouts = [await asyncio.to_thread(self._images.layout_json, image) for image in images]
                with ExitStack() as meanwhile:
                    # What is there already is held first: it is not to make way for what it needs besides.
                    for place, image in zip(places, images, strict=True):
                        if image.id in place:
                            meanwhile.enter_context(await self._residency.acquire(image, device=place.name))
                    claims = [
                        await claim(place, rank.working_bytes + place.missing_bytes(image))
                        for (place, rank), image in zip(ranks, images, strict=True)
                    ]
                    besides = [await claim(place, rank.starting_bytes) for place, rank in ranks] if starts else []
                    for reservation, rank in zip(claims, plan.ranks, strict=True):
                        reservation.resize(rank.working_bytes)  # the loads that begin now take the rest
                    holds = await self._all(images, places, on_progress)
                    supply = Supply(plan, holds, layouts, claims, starts=besides)
            on_error.pop_all()
            return supply

    async def resume(self, target: Target, forms: Sequence[str]) -> Supply:
        """What an engine holds that was given it by a daemon before us: the checkpoint, or the parts of an image.

        Raises NotFound if some of it is not in memory any more, OutOfMemory if budgets have become too small.
        """
        plan = await self._plan(target)
        is_image = plan is not None and list(forms) != [target.checkpoint.id]
        devices = [rank.device for rank in plan.ranks] if plan is not None and is_image else [HOST]
        if len(devices) != len(forms) or any(
            form not in self._residency.place(device) for form, device in zip(forms, devices, strict=True)
        ):
            raise NotFound(f"what it holds of {target.model_name} is not in memory any more")
        supply = await self.provide(target)
        if supply.forms != tuple(forms):
            supply.release()
            raise NotFound(f"what it holds of {target.model_name} is not what it would be given")
        return supply

    async def forms(self, target: Target, device: str) -> Sequence[tuple[Checkpoint, str]]:
        """What to bring into memory now for a swap later, and to which device: the image, if there is one for such an
        engine, each rank's part to the host or to its own GPU; else the checkpoint."""
        with contextlib.suppress(FlashdError):  # no such engine can be started; whoever swaps is told
            plan = await self._plan(target)
            if plan is not None and (images := await self._image(plan)):
                if device == HOST or len(images) == 1:
                    return [(image, device) for image in images]
                return [(image, rank.device) for image, rank in zip(images, plan.ranks, strict=True)]
        return [(target.checkpoint, device)]

    async def fits_without(self, target: Target, old: Supply, *, starts: bool = False) -> bool:
        """Whether there would be room for a model if what another engine was given were given up."""
        return all(
            size_bytes <= place.pool.budget_bytes - place.fixed_bytes() + old.given_up_bytes(place)
            for place, size_bytes in (await self._needed_bytes(target, starts=starts)).items()
        )

    async def fits_beside(self, target: Target) -> bool:
        """Whether there is room for a model without anything making way."""
        needed_bytes = await self._needed_bytes(target)
        return all(size_bytes <= place.pool.free_bytes for place, size_bytes in needed_bytes.items())

    async def _needed_bytes(self, target: Target, *, starts: bool = False) -> dict[Place, int]:
        plan = await self._plan(target)
        needed_bytes: dict[Place, int] = {}

        def need(place: Place, size_bytes: int) -> None:
            needed_bytes[place] = needed_bytes.get(place, 0) + size_bytes

        images = await self._image(plan) if plan else ()
        if not images:
            host = self._residency.place(HOST)
            need(host, host.missing_bytes(target.checkpoint))
        for index, rank in enumerate(plan.ranks if plan else ()):
            place = self._residency.place(rank.device)
            weights_bytes = place.missing_bytes(images[index]) if images else rank.weights_bytes
            need(place, rank.working_bytes + weights_bytes + (rank.starting_bytes if starts else 0))
        return needed_bytes

    async def binding(self, target: Target, supply: Supply) -> Binding:
        """What an engine is told of it."""
        checkpoint, plan = target.checkpoint, supply.plan
        layouts = supply.layouts or [await asyncio.to_thread(checkpoint.layout_json)]
        first, *further = (
            RankArena(hold.arena.fd, hold.arena.size_bytes, layout)
            for hold, layout in zip(supply.holds, layouts, strict=True)
        )
        return Binding(
            model_name=target.model_name,
            names=target.names,
            checkpoint_id=checkpoint.id,
            architecture_key=checkpoint.manifest.architecture_key,
            arena_fd=first.fd,
            arena_bytes=first.size_bytes,
            layout=first.layout,
            side_files=checkpoint.side_files(),
            digests=checkpoint.manifest.side_files,
            devices=tuple(rank.device for rank in plan.ranks) if plan else (),
            is_image=supply.is_image,
            wants_image=plan is not None and plan.makes_image and not supply.is_image,
            further=tuple(further),
            private_to=target.private_to,
            options=target.options,
            forms=supply.forms,
        )

    async def take_in(self, target: Target, supply: Supply, made: Made) -> None:
        """The image that an engine has made of what it was given is ours from here on, and what it holds.

        An image that makes no sense, or that one rank's part is missing of, is not kept, and the engine keeps what it
        was given. Raises nothing.
        """
        plan = supply.plan
        if plan is None or supply.is_image or len(made.arenas) != len(plan.ranks):
            close_all([rank.fd for rank in made.arenas])
            return
        places = [self._residency.place(rank.device) for rank in plan.ranks]
        try:
            arenas = await self._adopted(places, made)
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            return
        try:
            images = [
                self._images.describe(rank.key, part.layout, part.size_bytes, target.checkpoint.id)
                for rank, part in zip(plan.ranks, made.arenas, strict=True)
            ]
            parts = list(zip(places, images, arenas, supply.rooms, strict=True))
            for place, image, arena, room in parts:
                place.check_admission(image, arena, room)
            holds = [place.admit(image, arena, room) for place, image, arena, room in parts]
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            self._drop(plan)
            for arena in arenas:
                arena.close()
            return
        supply.became(holds, [part.layout for part in made.arenas])
        for place, image in zip(places, images, strict=True):
            self._on_made(image, place)

    async def _plan(self, target: Target) -> GpuPlan | None:
        return await self._factories[target.engine_kind].gpu_plan(target.checkpoint, target.options)

    async def _adopted(self, places: Sequence[Place], made: Made) -> Sequence[Arena]:
        """Raises InvalidArgument if one of them is not what is said; then none is open any more."""
        arenas: list[Arena] = []
        try:
            for place, part in zip(places, made.arenas, strict=True):
                arenas.append(await asyncio.to_thread(place.device.adopt, part.fd, part.size_bytes))
        except BaseException:
            for arena in arenas:
                arena.close()
            close_all([part.fd for part in made.arenas[len(arenas) + 1 :]])
            raise
        return arenas

    async def _all(self, images: Sequence[Checkpoint], places: Sequence[Place], on_progress: Progress) -> list[Hold]:
        """Each rank's part of an image on its device, all at once. If one does not come, none is held."""
        done_bytes = [0] * len(images)
        total_bytes = sum(image.manifest.data_bytes for image in images)

        def tell(index: int, done: int, _: int) -> None:
            done_bytes[index] = done
            on_progress(sum(done_bytes), total_bytes)

        loads = [
            asyncio.ensure_future(self._residency.acquire(image, partial(tell, index), device=place.name))
            for index, (image, place) in enumerate(zip(images, places, strict=True))
        ]
        try:
            return await asyncio.gather(*loads)
        except BaseException:
            for load in loads:
                load.add_done_callback(_not_wanted)
                load.cancel()
            await asyncio.wait(loads)
            raise

    async def _image(self, plan: GpuPlan) -> Sequence[Checkpoint]:
        """The image of a plan, a part a rank, if some memory or the disk has all of it; else nothing. What there is of
        one that lacks a part is of no use, and goes."""
        if not plan.makes_image:
            return ()
        found = [await self._found(rank) for rank in plan.ranks]
        parts = [part for part in found if part is not None]
        if len(parts) == len(found):
            return parts
        if parts:
            self._drop(plan)
        for part in parts:
            with contextlib.suppress(Busy):
                await self._residency.evict(part.id)
        return ()

    async def _found(self, rank: RankPlan) -> Checkpoint | None:
        image = await asyncio.to_thread(self._images.get, rank.key)
        if image is None or self._residency.devices_of(image.id):
            return image
        if not self._images.is_stored(rank.key):
            return None  # it was not written before the last arena went
        try:
            await asyncio.to_thread(image.digests)
        except CorruptCheckpoint as error:
            log.warning("%s, so it is made again", error.message)
            self._images.drop(rank.key)
            return None
        return image

    def _drop(self, plan: GpuPlan) -> None:
        for rank in plan.ranks:
            self._images.drop(rank.key)


def _not_wanted(load: asyncio.Future[Hold]) -> None:
    if not load.cancelled() and load.exception() is None:
        load.result().release()
