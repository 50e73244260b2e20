"""The faults of a chaos run, one every few seconds, drawn from the seed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from redis.exceptions import RedisError

from tests.chaos.fleet import EXIT_MARGIN_S, Slot, subscriber_of
from tests.chaos.readers import Reader
from tests.chaos.site import Site

SHORT_PAUSE_S = 2.0
REDIS_PAUSE_S = 2.0
BACKGROUND_S = (1.0, 3.0)
LEAST_UP = 2
BLACKHOLE_S = 12.0
"""How long what went into a blackhole is kept open."""
Fault = Callable[[], Awaitable[bool]]


class Chaos:
    """Does the faults. `run` is its life; what it has begun is whole when it returns."""

    def __init__(self, site: Site, slots: Sequence[Slot], readers: Sequence[Reader]) -> None:
        self._site = site
        self._slots = slots
        self._readers = readers
        self._chance = site.chance("faults")
        self._redis_busy = False
        self.redis_faults: list[tuple[float, float]] = []
        """When Redis was not there, or hung."""
        self._weights: dict[str, tuple[int, Fault]] = {
            "kill an instance": (3, self._kill),
            "terminate an instance": (2, self._terminate),
            "kill Redis": (2, self._kill_redis),
            "pause Redis": (2, self._pause_redis),
            "pause an instance": (2, self._pause),
            "pause an instance beyond its lease": (2, self._pause_long),
            "cut a client": (4, self._cut),
            "blackhole a subscriber": (3, self._blackhole),
        }

    async def run(self) -> None:
        """Faults for as long as the options say; returns once all is whole again."""
        until = self._site.now() + self._site.options.seconds
        async with asyncio.TaskGroup() as group:
            while self._site.now() < until:
                await asyncio.sleep(self._chance.uniform(*BACKGROUND_S))
                names = list(self._weights)
                name = self._chance.choices(names, [weight for weight, _ in self._weights.values()])[0]
                group.create_task(self._do(name))
        await asyncio.gather(*(slot.up() for slot in self._slots))

    async def _do(self, name: str) -> None:
        done = await self._weights[name][1]()
        self._site.counts[f"fault: {name}" if done else f"not possible then: {name}"] += 1

    def _take(self) -> Slot | None:
        """An instance to do something to, if enough others are up."""
        slots = [slot for slot in self._slots if slot.is_up]
        if len(slots) <= LEAST_UP:
            return None
        slot = self._chance.choice(slots)
        slot.busy = True
        return slot

    async def _kill(self) -> bool:
        slot = self._take()
        if slot is None or slot.instance is None:
            return False
        self._site.note(f"kill instance {slot.number}")
        slot.life.killed_at = self._site.now()
        slot.instance.kill()
        await self._next(slot)
        return True

    async def _terminate(self) -> bool:
        slot = self._take()
        if slot is None or slot.instance is None:
            return False
        self._site.note(f"terminate instance {slot.number}")
        life, one = slot.life, slot.instance
        life.terminated_at = self._site.now()
        one.terminate()
        drain_s = self._site.options.drain_s + EXIT_MARGIN_S
        try:
            async with asyncio.timeout(drain_s):
                status = await one.exit_status()
            self._site.check(status == 0, "a bad exit", f"instance {slot.number}", lambda: f"status {status}")
        except TimeoutError:
            self._site.violated("a slow exit", f"instance {slot.number}", f"not after {drain_s} s: {one.log[-5:]}")
            life.killed_at = self._site.now()
            one.kill()
        await self._next(slot)
        return True

    async def _next(self, slot: Slot) -> None:
        """Wait until the next instance is up."""
        count = len(slot.lives)
        while len(slot.lives) == count:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.02)
        slot.busy = False

    async def _pause(self) -> bool:
        return await self._pause_for(SHORT_PAUSE_S)

    async def _pause_long(self) -> bool:
        return await self._pause_for(self._site.options.lease_s * 2 + self._chance.uniform(1, 3))

    async def _pause_for(self, seconds: float) -> bool:
        slot = self._take()
        if slot is None or slot.instance is None:
            return False
        self._site.note(f"pause instance {slot.number} for {seconds:.1f} s")
        one, began = slot.instance, self._site.now()
        one.pause()
        await asyncio.sleep(seconds)
        one.resume()
        slot.life.pauses.append((began, self._site.now()))
        self._site.note(f"instance {slot.number} goes on")
        slot.busy = False
        return True

    async def _kill_redis(self) -> bool:
        if self._redis_busy:
            return False
        self._redis_busy = True
        self._site.note("kill Redis")
        began = self._site.now()
        await self._site.redis.kill()
        await asyncio.sleep(self._chance.uniform(0.1, 2.0))
        await self._site.redis.start()
        self._redis_back(began)
        return True

    async def _pause_redis(self) -> bool:
        if self._redis_busy:
            return False
        self._redis_busy = True
        self._site.note("pause Redis")
        began = self._site.now()
        self._site.redis.pause()
        await asyncio.sleep(REDIS_PAUSE_S)
        self._site.redis.resume()
        self._redis_back(began)
        return True

    def _redis_back(self, began: float) -> None:
        self._site.note("Redis is back")
        self.redis_faults.append((began, self._site.now()))
        self._redis_busy = False

    async def _cut(self) -> bool:
        readers = list(self._readers)
        self._chance.shuffle(readers)
        return any(reader.cut() for reader in readers[:10])

    async def _blackhole(self) -> bool:
        slots = [slot for slot in self._slots if slot.is_up]
        slot = self._chance.choice(slots or list(self._slots))
        try:
            connection = await subscriber_of(slot, self._site.redis)
        except (RedisError, OSError, TimeoutError):
            return False
        if connection is None:
            return False
        self._site.note(f"blackhole the subscriber of instance {slot.number}")
        await connection.blackhole()
        with suppress(TimeoutError):
            async with asyncio.timeout(BLACKHOLE_S):
                await connection.closed()
        await connection.reset()
        return True
