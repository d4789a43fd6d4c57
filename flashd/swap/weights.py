# SPDX-License-Identifier: Apache-2.0
"""Provides engines with weights, and reserves the memory for them.

An engine that works in host memory gets the checkpoint there. An engine on GPUs gets the image that its build has made
of the checkpoint earlier, with each rank's part on that rank's GPU, to be mapped as it is. If there is no image yet, it
gets the checkpoint, and memory is reserved for the image that it makes, which we own from then on. Memory is also
reserved for the engine's own needs while serving. No transfer begins before all of this is reserved on every device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from flashd.checkpoint.files import Checkpoint
from flashd.engines.engine import (
    NO_OPTIONS,
    Binding,
    BoundWeights,
    Engine,
    EngineFactory,
    EngineImage,
    EngineOptions,
    GpuPlan,
    ModelIdentity,
    RankMemory,
    RankPlan,
    StoredFile,
)
from flashd.engines.kv_cache import LEAST_BYTES
from flashd.errors import Busy, CorruptCheckpoint, FlashdError, NotFound, OutOfMemory
from flashd.io.streamer import blake3
from flashd.memory.arena import Arena
from flashd.memory.device import HOST, Tier
from flashd.memory.device_cache import DeviceCache, Hold
from flashd.memory.pool import Reservation
from flashd.memory.residency import Residency
from flashd.memory.transfers import Progress
from flashd.tasks import close_all, tell_defect

log = logging.getLogger(__name__)

_MOST_ENDED = 256  # engines that may still be about to say something when they end


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a swap: a model, the kind of engine and its options. `names` are those that requests may use.

    A model that is `private_to` a user gets separate engines, to which no other user's connection leads.
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


@dataclass(frozen=True, slots=True)
class Recipient:
    """The engine that weights are for: whether it `starts`, and the KV cache of each rank that it has had since its
    start, if it claims that anew; 0 otherwise. One that `stays_parked`, and only makes an image, needs no KV cache.
    By its `identity` it can map images that no other engine can. One that `makes_no_image` has less room than it would
    need for its own copy of the weights and the image.
    """

    starts: bool = False
    cache_bytes: int = 0
    stays_parked: bool = False
    makes_no_image: bool = False
    identity: str = ""

    @classmethod
    def of(cls, engine: Engine) -> Recipient:
        """One that is to be woken."""
        return cls(cache_bytes=engine.cache_bytes, identity=engine.identity)


_AN_ENGINE = Recipient()  # one that serves


class Images(Protocol):
    """The existing images (flashd/store/images.py)."""

    def get(self, key: str) -> Checkpoint | None: ...

    def is_stored(self, key: str) -> bool: ...

    def layout_json(self, image: Checkpoint) -> str: ...

    def describe(self, key: str, layout: str, data_bytes: int, made_of: str, *, maker: str = "") -> Checkpoint: ...

    def drop(self, key: str) -> None: ...

    def drop_unless(self, is_there: Callable[[str], bool]) -> list[str]: ...


class Supply:
    """The memory given to one engine, held until `release`.

    `holds` are those of the checkpoint, until the engine has copied it, or of its image's parts, one for each rank. The
    other fields are reservations with one entry for each rank: `claims` for its needs besides weights, `rooms` for its
    weights until they are an image that we own, and `starts` for additional needs until it has started.
    """

    def __init__(
        self,
        plan: GpuPlan | None,
        holds: Sequence[Hold],
        layouts: Sequence[str] = (),
        claims: Sequence[Reservation] = (),
        rooms: Sequence[Reservation] = (),
        starts: Sequence[Reservation] = (),
        cache_bytes: int = 0,
        maker: str = "",
    ) -> None:
        """`layouts` are those of the image; empty for a checkpoint. `cache_bytes` of each claim are for a KV cache.

        `maker` is the identity of the only engine that can map the image, if there is such a limit.
        """
        self.plan = plan
        self.maker = maker
        self.holds = list(holds)
        self.layouts = list(layouts)
        self.from_tier = min((hold.from_tier for hold in holds), key=list(Tier).index, default=Tier.STORED)
        self.rooms = list(rooms)
        self.cache_bytes = cache_bytes
        self._cache_grows = plan is not None and plan.cache_grows
        self._claims = list(claims)
        self._starts = list(starts)

    @property
    def is_image(self) -> bool:
        return bool(self.layouts)

    @property
    def wants_image(self) -> bool:
        """Tells whether the engine is to make an image."""
        return self.plan is not None and self.plan.makes_image and not self.is_image

    @property
    def arena_ids(self) -> tuple[str, ...]:
        """The ids of the arenas' contents."""
        return tuple(hold.checkpoint_id for hold in self.holds)

    def is_for(self, engine: Engine) -> bool:
        """Tells whether an engine that runs can take the weights."""
        return self.maker in {"", engine.identity}

    def became(self, holds: Sequence[Hold], layouts: Sequence[str], maker: str) -> None:
        """Replaces the checkpoint with the image that was made in the reserved memory."""
        self.rooms.clear()
        for hold in self.holds:
            hold.release()
        self.holds, self.layouts, self.maker = list(holds), list(layouts), maker

    def exchange(self, other: Supply) -> None:
        """Takes everything of another one, after this one was released."""
        self.plan, self.maker, self.from_tier = other.plan, other.maker, other.from_tier
        self.holds, self.layouts, self.rooms = other.holds, other.layouts, other.rooms
        self.cache_bytes, self._cache_grows = other.cache_bytes, other._cache_grows
        self._claims, self._starts = other._claims, other._starts

    def was_copied(self) -> None:
        """Notes that the engine has copied the checkpoint: its arena may be evicted from now on."""
        for hold in self.holds:
            hold.release()
        self.holds.clear()

    def let_cache_grow(self) -> None:
        """Adds the memory that is free to the KV cache of an engine that is about to start, except room for one more
        such model. All ranks get the same. Supplier calls it when nothing else makes room.
        """
        if self.plan is None or not self._cache_grows:
            return
        spare_bytes = min(
            claim.pool.free_bytes - rank.weights_bytes - rank.working_bytes - rank.starting_bytes
            for rank, claim in zip(self.plan.ranks, self._claims, strict=True)
        )
        # There is no KV cache yet while memory is needed for the start.
        spare_bytes += min((start.size_bytes for start in self._starts), default=0)
        most_bytes = min(rank.most_cache_bytes for rank in self.plan.ranks) - self.cache_bytes
        if (added_bytes := min(spare_bytes, most_bytes)) > 0:
            self.cache_bytes += added_bytes
            for start in self._starts:
                start.resize(max(0, start.size_bytes - added_bytes))
            for claim in self._claims:
                claim.resize(claim.size_bytes + added_bytes)

    def shrink_cache(self, least_bytes: int) -> bool:
        """Gives up what the KV cache has in addition to `least_bytes`, for good. Returns False if it has nothing."""
        spare_bytes = self.cache_bytes - least_bytes
        if not self._cache_grows or spare_bytes <= 0:
            return False
        self._cache_grows = False
        self.cache_bytes = least_bytes
        for claim in self._claims:
            claim.resize(claim.size_bytes - spare_bytes)
        if self._starts:  # a part of which had become cache
            for start, size_bytes in zip(self._starts, self._start_bytes(), strict=True):
                start.resize(size_bytes)
        return True

    def claim_cache(self, size_bytes: int) -> bool:
        """Claims the KV cache of the parked engine that is about to be woken, which may not be the one that the weights
        were meant for. Returns False, without any change, if free memory does not suffice. Supplier calls it when
        nothing else makes room.
        """
        if self.plan is None or not self.plan.cache_grows:
            return True
        added_bytes = size_bytes - self.cache_bytes
        if added_bytes > min(claim.pool.free_bytes if self._cache_grows else 0 for claim in self._claims):
            return False
        self.cache_bytes = size_bytes
        for claim in self._claims:
            claim.resize(claim.size_bytes + added_bytes)
        return True

    def keeps_cache_of(self, former: Supply) -> None:
        """Notes that the engine keeps the KV cache that it has had for other weights, and so exchanges the claims."""
        if self.plan is not None and self.plan.cache_grows:
            self._claims, former._claims = former._claims, self._claims
            self.cache_bytes, former.cache_bytes = former.cache_bytes, self.cache_bytes

    async def claim_start(self, claim: Callable[[str, int], Awaitable[Reservation]]) -> None:
        """Claims the additional needs of an engine's start, unless they are claimed: the weights may have been meant
        for an engine that served or was parked.

        `claim` reserves bytes on a device. Raises OutOfMemory, without any change.
        """
        if self.plan is None or self._starts:
            return
        with ExitStack() as on_error:
            starts = []
            for rank, size_bytes in zip(self.plan.ranks, self._start_bytes(), strict=True):
                starts.append(await claim(rank.device, size_bytes))
                on_error.callback(starts[-1].release)
            on_error.pop_all()
        self._starts = starts

    def _start_bytes(self) -> list[int]:
        """The additional needs of a start on each rank, whose KV cache does not exist before its end."""
        ranks = self.plan.ranks if self.plan else ()
        return [replace(rank, cache_bytes=self.cache_bytes).starting_bytes for rank in ranks]

    def has_started(self) -> None:
        """Releases the reservations for the start, which is over."""
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

    def given_up_bytes(self, cache: DeviceCache) -> int:
        """Returns the bytes that its release would free on a device."""
        held_bytes = sum(cache.given_up_bytes(hold) for hold in self.holds if hold.cache is cache)
        claims = [*self._claims, *self.rooms, *self._starts]
        return held_bytes + sum(claim.size_bytes for claim in claims if claim.pool is cache.pool)


class Supplier:
    """Provides engines with weights, on one event loop."""

    def __init__(
        self,
        residency: Residency,
        factories: Mapping[str, EngineFactory],
        images: Images,
        *,
        on_made: Callable[[Checkpoint, DeviceCache], None] = lambda image, cache: None,
    ) -> None:
        """`on_made` is called with images that exist only on a device so far."""
        self._residency = residency
        self._factories = factories
        self._images = images
        self._on_made = on_made
        self._removals: set[asyncio.Task[None]] = set()
        self._ended: deque[str] = deque(maxlen=_MOST_ENDED)  # identities of engines
        self._left: set[str] = set()  # images that nothing can map, but which were still held
        self._declined: set[str] = set()  # keys of images that engines could not make

    async def provide(
        self, target: Target, on_progress: Progress = lambda done, total: None, *, to: Recipient = _AN_ENGINE
    ) -> Supply:
        """Provides the memory for a target, with all that the recipient needs, such as for its start.

        Raises OutOfMemory and the errors of a load, without holding anything. The call may be cancelled.
        """
        plan = await self._plan(target, to)
        if plan is None:
            return Supply(None, [await self._residency.acquire(target.checkpoint, on_progress)])
        cache_bytes = plan.ranks[0].cache_bytes
        caches = [self._residency.cache(rank.device) for rank in plan.ranks]
        ranks = list(zip(caches, plan.ranks, strict=True))
        images = await self._image(plan, to)
        with ExitStack() as on_error:

            async def claim(cache: DeviceCache, size_bytes: int) -> Reservation:
                made = await cache.claim(size_bytes)
                on_error.callback(made.release)
                return made

            if not images:
                claims = [await claim(cache, rank.working_bytes) for cache, rank in ranks]
                rooms = [await claim(cache, rank.weights_bytes) for cache, rank in ranks]
                besides = [await claim(cache, rank.starting_bytes) for cache, rank in ranks] if to.starts else []
                hold = await self._residency.acquire(target.checkpoint, on_progress)
                supply = Supply(plan, [hold], (), claims, rooms, besides, cache_bytes)
            else:
                layouts = [await asyncio.to_thread(self._images.layout_json, image) for image in images]
                with ExitStack() as meanwhile:
                    # Parts already in memory are held first, lest they be evicted for the engine's other needs.
                    for cache, image in zip(caches, images, strict=True):
                        if image.id in cache:
                            meanwhile.enter_context(await self._residency.acquire(image, device=cache.name))
                    claims = [
                        await claim(cache, rank.working_bytes + cache.missing_bytes(image))
                        for (cache, rank), image in zip(ranks, images, strict=True)
                    ]
                    besides = [await claim(cache, rank.starting_bytes) for cache, rank in ranks] if to.starts else []
                    rooms = [
                        reservation.split(reservation.size_bytes - rank.working_bytes)
                        for reservation, rank in zip(claims, plan.ranks, strict=True)
                    ]
                    for room in rooms:  # what no load takes, because another one brings the same, is free again
                        meanwhile.callback(room.release)
                    holds = await self._all(images, caches, rooms, on_progress)
                    maker = "" if images[0].id == plan.ranks[0].key else to.identity
                supply = Supply(plan, holds, layouts, claims, (), besides, cache_bytes, maker)
            on_error.pop_all()
            return supply

    def note_no_image(self, supply: Supply) -> None:
        """Notes that an engine could not make the image it was asked for, lest memory be reserved for that again."""
        if supply.plan is not None and supply.plan.makes_image:
            self._declined.add(supply.plan.ranks[0].key)

    async def resume(self, target: Target, arena_ids: Sequence[str], engine: Recipient = _AN_ENGINE) -> Supply:
        """Holds the memory again that an earlier daemon gave to an engine: the checkpoint or the parts of an image, and
        the KV cache.

        Raises NotFound if a part is no longer in memory, or OutOfMemory if budgets have become too small.
        """
        plan = await self._plan(target, engine)
        is_image = plan is not None and list(arena_ids) != [target.checkpoint.id]
        if list(arena_ids) == [target.checkpoint.id] and self._factories[target.engine_kind].copies_checkpoints:
            return await self._of_copy(plan)
        devices = [rank.device for rank in plan.ranks] if plan is not None and is_image else [HOST]
        if len(devices) != len(arena_ids) or any(
            arena_id not in self._residency.cache(device) for arena_id, device in zip(arena_ids, devices, strict=True)
        ):
            raise NotFound(f"its weights of {target.model_name} are no longer in memory")
        supply = await self.provide(target, to=engine)
        if supply.arena_ids != tuple(arena_ids):
            supply.release()
            raise NotFound(f"its weights of {target.model_name} are not those that it would be given now")
        return supply

    async def _of_copy(self, plan: GpuPlan | None) -> Supply:
        """Reserves the memory of an engine that has copied its checkpoint. Raises OutOfMemory."""
        with ExitStack() as on_error:
            claims: list[Reservation] = []
            rooms: list[Reservation] = []
            for rank in plan.ranks if plan else ():
                for reserved, size_bytes in ((claims, rank.working_bytes), (rooms, rank.weights_bytes)):
                    reserved.append(await self._residency.cache(rank.device).claim(size_bytes))
                    on_error.callback(reserved[-1].release)
            on_error.pop_all()
        return Supply(plan, (), (), claims, rooms, (), plan.ranks[0].cache_bytes if plan else 0)

    async def forms(self, target: Target, device: str) -> Sequence[tuple[Checkpoint, str]]:
        """Returns what to load now for a later swap, with the device for each part.

        This is the image for such an engine, if there is one, with each rank's part on the host or on its own GPU; else
        the checkpoint.
        """
        with contextlib.suppress(FlashdError):  # no such engine can be started, which a swap reports
            plan = await self._plan(target)
            if plan is not None and (images := await self._image(plan)):
                if device == HOST or len(images) == 1:
                    return [(image, device) for image in images]
                return [(image, rank.device) for image, rank in zip(images, plan.ranks, strict=True)]
        return [(target.checkpoint, device)]

    async def fits_without(self, target: Target, given_up: Sequence[Supply], *, to: Recipient = _AN_ENGINE) -> bool:
        """Tells whether there would be room for a model if other engines gave up what they were given."""
        return all(
            size_bytes
            <= cache.pool.budget_bytes - cache.fixed_bytes() + sum(each.given_up_bytes(cache) for each in given_up)
            for cache, size_bytes in (await self._needed_bytes(target, to)).items()
        )

    async def is_grown(self, target: Target, engine: Recipient) -> bool:
        """Tells whether a new engine would do with a smaller KV cache than this one, which took what was free."""
        least = await self._plan(target)
        return least is not None and least.cache_grows and engine.cache_bytes > least.ranks[0].cache_bytes

    async def shrink_cache(self, target: Target, supply: Supply) -> bool:
        """Leaves only the KV cache that the model needs, because GPUs have less memory free than their pools say.

        Returns False if it was no larger.
        """
        least = await self._plan(target)
        return least is not None and supply.shrink_cache(least.ranks[0].cache_bytes)

    async def claim_start(self, target: Target, supply: Supply) -> None:
        """Claims what the start of an engine needs in addition; with a smaller KV cache if there is no room otherwise.

        Raises OutOfMemory.
        """

        async def claim(device: str, size_bytes: int) -> Reservation:
            return await self._residency.cache(device).claim(size_bytes)

        try:
            await supply.claim_start(claim)
        except OutOfMemory:
            if not await self.shrink_cache(target, supply):
                raise
            await supply.claim_start(claim)

    async def let_cache_grow(self, supply: Supply) -> None:
        """Has the KV cache of an engine that is about to start take free memory, as Supply does."""
        async with self._undisturbed(supply.plan):
            supply.let_cache_grow()

    async def claim_cache(self, supply: Supply, size_bytes: int) -> bool:
        """Claims the KV cache of a parked engine, as Supply does."""
        async with self._undisturbed(supply.plan):
            return supply.claim_cache(size_bytes)

    @contextlib.asynccontextmanager
    async def _undisturbed(self, plan: GpuPlan | None) -> AsyncIterator[None]:
        """A context in which what is free on a plan's devices was not freed for a load."""
        caches = {self._residency.cache(rank.device) for rank in (plan.ranks if plan else ())}
        async with contextlib.AsyncExitStack() as stack:
            for cache in sorted(caches, key=lambda cache: cache.name):  # in one order, lest two wait for each other
                await stack.enter_async_context(cache.undisturbed())
            yield

    async def fits_another(self, target: Target, *, engine_bytes: int, free_bytes: int) -> bool:
        """Tells whether free memory suffices for one more engine on GPUs, whose process takes `engine_bytes` of the
        `free_bytes` of the machine. False for one in host memory, whose needs are unknown.
        """
        if await self._plan(target) is None:
            return False
        needed_bytes = await self._needed_bytes(target, Recipient(starts=True))
        of_host_bytes = needed_bytes.get(self._residency.cache(HOST), 0)  # which may be the GPU's as well
        return engine_bytes + of_host_bytes <= free_bytes and all(
            size_bytes <= cache.pool.free_bytes for cache, size_bytes in needed_bytes.items()
        )

    async def fits_beside(self, target: Target, *, to: Recipient = _AN_ENGINE) -> bool:
        """Tells whether a model fits into memory without evicting anything."""
        needed_bytes = await self._needed_bytes(target, to)
        return all(size_bytes <= cache.pool.free_bytes for cache, size_bytes in needed_bytes.items())

    async def _needed_bytes(self, target: Target, to: Recipient) -> dict[DeviceCache, int]:
        plan = await self._plan(target, to)
        needed_bytes: dict[DeviceCache, int] = {}

        def need(cache: DeviceCache, size_bytes: int) -> None:
            needed_bytes[cache] = needed_bytes.get(cache, 0) + size_bytes

        images = await self._image(plan, to) if plan else ()
        if not images:
            host = self._residency.cache(HOST)
            need(host, host.missing_bytes(target.checkpoint))
        for index, rank in enumerate(plan.ranks if plan else ()):
            cache = self._residency.cache(rank.device)
            weights_bytes = cache.missing_bytes(images[index]) if images else rank.weights_bytes
            need(cache, rank.working_bytes + weights_bytes + (rank.starting_bytes if to.starts else 0))
        return needed_bytes

    async def binding(self, target: Target, supply: Supply) -> Binding:
        """Makes the binding of a target from its supply."""
        checkpoint, plan = target.checkpoint, supply.plan
        layouts = supply.layouts or [await asyncio.to_thread(checkpoint.layout_json)]
        await asyncio.to_thread(checkpoint.check_side_files)
        digests = checkpoint.manifest.side_files
        return Binding(
            model=ModelIdentity(target.model_name, target.names, checkpoint.id, target.private_to, target.options),
            weights=BoundWeights(
                ranks=tuple(
                    RankMemory(hold.arena.fd, hold.arena.size_bytes, layout)
                    for hold, layout in zip(supply.holds, layouts, strict=True)
                ),
                arena_ids=supply.arena_ids,
                is_image=supply.is_image,
                wants_image=supply.wants_image,
            ),
            side_files={name: StoredFile(path, digests[name]) for name, path in checkpoint.side_files().items()},
            devices=tuple(rank.device for rank in plan.ranks) if plan else (),
        )

    async def take_in(self, target: Target, supply: Supply, made: EngineImage, identity: str) -> None:
        """Adopts the image that the engine of this identity has made, which replaces the checkpoint as its supply.

        An image that is invalid, or lacks the part of a rank, is not kept, and the supply stays as it is. Never raises.
        """
        plan = supply.plan
        if plan is None or supply.is_image or len(made.ranks) != len(plan.ranks):
            close_all([rank.fd for rank in made.ranks])
            return
        caches = [self._residency.cache(rank.device) for rank in plan.ranks]
        try:
            arenas = await self._adopted(caches, made)
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            return
        maker = identity if made.is_own else ""
        if maker and maker in self._ended:
            log.warning("the image of %s is not kept: its engine has ended", target.model_name)
            _close(arenas)
            return
        keys = _keys(plan, maker)
        is_known = any([await asyncio.to_thread(self._images.get, key) is not None for key in keys])
        try:
            images = [
                self._images.describe(key, part.layout, part.size_bytes, target.checkpoint.id, maker=maker)
                for key, part in zip(keys, made.ranks, strict=True)
            ]
            parts = list(zip(caches, images, arenas, supply.rooms, strict=True))
            async with self._undisturbed(plan):
                for cache, image, arena, room in parts:
                    cache.check_admission(image, arena, room)
                holds = [cache.admit(image, arena, room) for cache, image, arena, room in parts]
        except FlashdError as error:
            log.warning("the image of %s is not kept: %s", target.model_name, error)
            if not is_known:  # otherwise it is in use, or stored
                self._drop(keys)
            _close(arenas)
            return
        supply.became(holds, [part.layout for part in made.ranks], maker)
        for cache, image in zip(caches, images, strict=True):
            self._on_made(image, cache)

    async def _plan(self, target: Target, to: Recipient = _AN_ENGINE) -> GpuPlan | None:
        plan = await self._factories[target.engine_kind].gpu_plan(target.checkpoint, target.options)
        if plan is not None and plan.makes_image and (to.makes_no_image or plan.ranks[0].key in self._declined):
            plan = plan.without_image()
        if plan is None or not (plan.cache_grows or to.stays_parked):
            return plan
        size_bytes = 0
        if not to.stays_parked:
            size_bytes = to.cache_bytes or min(self._most_cache_bytes(rank) for rank in plan.ranks)
        return GpuPlan(tuple(replace(rank, cache_bytes=size_bytes) for rank in plan.ranks))

    def _most_cache_bytes(self, rank: RankPlan) -> int:
        """Returns the planned KV cache, or what the GPU can hold beside the weights: then vLLM shortens the context."""
        budget_bytes = self._residency.cache(rank.device).pool.budget_bytes
        return min(rank.cache_bytes, max(LEAST_BYTES, budget_bytes - rank.weights_bytes - rank.besides_bytes))

    async def _adopted(self, caches: Sequence[DeviceCache], made: EngineImage) -> Sequence[Arena]:
        """Adopts the parts of an image. Raises InvalidArgument, after closing all, if one is not as described."""
        arenas: list[Arena] = []
        try:
            for cache, part in zip(caches, made.ranks, strict=True):
                arenas.append(await asyncio.to_thread(cache.device.adopt, part.fd, part.size_bytes))
        except BaseException:
            for arena in arenas:
                arena.close()
            close_all([part.fd for part in made.ranks[len(arenas) + 1 :]])
            raise
        return arenas

    async def _all(
        self,
        images: Sequence[Checkpoint],
        caches: Sequence[DeviceCache],
        rooms: Sequence[Reservation],
        on_progress: Progress,
    ) -> list[Hold]:
        """Loads all parts of an image concurrently, each to the memory reserved on its rank's device, and holds them.

        If one fails, none is held.
        """
        done_bytes = [0] * len(images)
        total_bytes = sum(image.manifest.data_bytes for image in images)

        def tell(index: int, done: int, _: int) -> None:
            done_bytes[index] = done
            on_progress(sum(done_bytes), total_bytes)

        loads = [
            asyncio.ensure_future(self._residency.acquire(image, partial(tell, index), device=cache.name, room=room))
            for index, (image, cache, room) in enumerate(zip(images, caches, rooms, strict=True))
        ]
        try:
            return await asyncio.gather(*loads)
        except BaseException:
            for load in loads:
                load.add_done_callback(_not_wanted)
                load.cancel()
            await asyncio.wait(loads)
            raise

    async def _image(self, plan: GpuPlan, to: Recipient = _AN_ENGINE) -> Sequence[Checkpoint]:
        """Returns the image of a plan, one part for each rank, if memory or the disk has all parts; else nothing.

        An image that only this recipient can map counts if there is none for all. The other parts of an incomplete
        image are useless, and are removed.
        """
        if not plan.makes_image:
            return ()
        for keys in (_keys(plan), _keys(plan, to.identity) if to.identity else []):
            found = [await self._found(key) for key in keys]
            parts = [part for part in found if part is not None]
            if parts and len(parts) == len(found):
                return parts
            if parts:
                self._drop(keys)
            await self._evict([part.id for part in parts])
        return ()

    async def _found(self, key: str) -> Checkpoint | None:
        image = await asyncio.to_thread(self._images.get, key)
        if image is None or self._residency.devices_of(image.id):
            return image
        if not self._images.is_stored(key):
            return None  # it was not written before its last arena was freed
        try:
            await asyncio.to_thread(image.digests)
        except CorruptCheckpoint as error:
            log.warning("%s, so it is made again", error.message)
            self._images.drop(key)
            return None
        return image

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._images.drop(key)

    async def remove_images(self, *, unless: Callable[[str], bool]) -> None:
        """Removes the images that only engines could map of whose identity `unless` says False: they have ended."""
        await self._evict(await asyncio.to_thread(self._images.drop_unless, unless))

    def engine_ended(self, engine: Engine) -> None:
        """Removes the images that only this engine could map, in the background."""
        identity = engine.identity
        self._ended.append(identity)
        removal = asyncio.ensure_future(self.remove_images(unless=lambda maker: maker != identity))
        removal.set_name("remove images of an engine that has ended")
        self._removals.add(removal)
        removal.add_done_callback(tell_defect)
        removal.add_done_callback(self._removals.discard)

    async def settled(self) -> None:
        """Waits until the images of engines that have ended are removed."""
        if self._removals:
            await asyncio.wait(set(self._removals))

    async def sweep(self) -> None:
        """Removes images from memory that could not be removed before, because they were held."""
        left, self._left = self._left, set()
        await self._evict([*left])

    async def _evict(self, image_ids: Sequence[str]) -> None:
        for image_id in image_ids:
            try:
                await self._residency.evict(image_id)
            except Busy:
                self._left.add(image_id)


def _keys(plan: GpuPlan, maker: str = "") -> list[str]:
    """Returns the keys of an image, one for each rank; of one that only its maker can map, if there is such a limit."""
    return [blake3(f"{rank.key} of {maker}".encode()).hex() if maker else rank.key for rank in plan.ranks]


def _close(arenas: Sequence[Arena]) -> None:
    for arena in arenas:
        arena.close()


def _not_wanted(load: asyncio.Future[Hold]) -> None:
    if not load.cancelled() and load.exception() is None:
        load.result().release()
