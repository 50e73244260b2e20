"""Makes, out of the settings, the parts that a server and a worker are both composed of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from msgspec import Struct

from realtime.access.admission import Admission, Most
from realtime.access.audit import Audit
from realtime.access.keeper import Keeper
from realtime.access.ledger import Ledger
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.prices import parse_prices
from realtime.access.rates import MemoryRates, Rates, parse_rate
from realtime.access.revocations import MemoryRegister, Register
from realtime.access.till import Allowances, Till, parse_budget
from realtime.access.tokens import Verifier, make_verifier
from realtime.call import ModelSettings
from realtime.errors import StoreError
from realtime.extras import require
from realtime.journal import Journal
from realtime.lease import Lease
from realtime.observe import metrics
from realtime.observe.loop_watch import LoopWatch
from realtime.observe.traces import tracing
from realtime.offload import Offloader
from realtime.protocol import new_id
from realtime.responders.base import Responder
from realtime.responders.choose import choose
from realtime.settings import Settings, SettingsError, parsed, variable
from realtime.store.base import Store
from realtime.store.memory import MemoryStore
from realtime.store.sealing import AesGcm, parse_seal_keys
from realtime.tasks.builtin import BUILTIN_TASKS
from realtime.tasks.desk import LOOKS_PER_TTL
from realtime.tasks.local import LocalQueue
from realtime.tasks.queue import Queue
from realtime.tasks.registry import MARK, Registry, tasks_in
from realtime.tasks.run import Kit
from realtime.tasks.sweeper import Sweeper
from realtime.tasks.worker import Worker

RESIGN_S = 0.5
"""How long an instance that ends waits for a store that does not answer."""
SWEEP_S = 30.0
"""How often an unfinished task is looked after, at the least."""


class Parts(Struct, frozen=True):
    """The parts, not entered yet."""

    store: Store
    model: ModelSettings
    registry: Registry
    queue: Queue
    journal: Journal
    lease: Lease
    sweeper: Sweeper
    verifier: Verifier | None
    audit: Audit
    register: Register
    rates: Rates
    ledger: Ledger
    keeper: Keeper
    till: Till


def make_parts(settings: Settings, responder: Responder | None, tasks: Sequence[Callable[..., Any]]) -> Parts:
    """The parts that `settings` mean. Raises `SettingsError`, and `ValueError` for a function that is no task."""
    if settings.redis_url:
        require("redis", variable("redis_url"))
    store = _store(settings)
    registry = _registry(settings, tasks)
    queue = _queue(settings, registry)
    shortest_s = _shortest_ttl_s(settings)
    ledger = _ledger(settings)
    keeper = Keeper(ledger)
    verifier = make_verifier(settings)
    return Parts(
        store=store,
        model=_model(settings, responder),
        registry=registry,
        queue=queue,
        journal=Journal(store, interval_s=settings.journal_interval_ms / 1000),
        lease=Lease(store, new_id("inst"), lease_s=settings.lease_s),
        sweeper=Sweeper(store, queue, again_s=min(SWEEP_S, shortest_s / LOOKS_PER_TTL)),
        verifier=verifier,
        audit=Audit(hides_sessions=verifier is None),
        register=_register(settings),
        rates=_rates(settings),
        ledger=ledger,
        keeper=keeper,
        till=Till(ledger, keeper, _allowances(settings)),
    )


def make_admission(parts: Parts, settings: Settings) -> Admission:
    """What limits clients."""
    most = Most(
        connections_per_user=settings.max_connections_per_user,
        connections_per_address=settings.max_connections_per_address,
        responses=parsed(settings, "rate_responses", parse_rate),
        oneshots=parsed(settings, "rate_oneshots", parse_rate),
        tasks=parsed(settings, "rate_tasks", parse_rate),
        sessions=parsed(settings, "rate_sessions", parse_rate),
        messages=parsed(settings, "rate_messages", parse_rate),
    )
    return Admission(most, parts.rates, parts.keeper, parts.till)


def make_worker(parts: Parts, settings: Settings) -> Worker:
    """What runs tasks."""
    metrics.expect_tasks(parts.registry.definitions)
    kit = Kit(
        registry=parts.registry,
        journal=parts.journal,
        lease=parts.lease,
        model=parts.model,
        till=parts.till,
        ttl_s=settings.task_ttl_s,
        name_of=parts.audit.name_of,
    )
    return Worker(parts.store, parts.queue, kit, ttl_s=_shortest_ttl_s(settings))


@asynccontextmanager
async def entered(parts: Parts, settings: Settings) -> AsyncIterator[None]:
    """Have the parts work for as long as the block lasts; at its end the instance's lease is given back."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(tracing(settings.traces))
        await stack.enter_async_context(LoopWatch(settings.loop_block_ms / 1000))
        await stack.enter_async_context(Offloader())
        await stack.enter_async_context(parts.store)
        await stack.enter_async_context(parts.rates)
        await stack.enter_async_context(parts.ledger)
        await stack.enter_async_context(_running(parts.keeper))
        owned: list[object] = [parts.model.responder, parts.verifier, parts.register]
        for part in owned:
            if isinstance(part, AbstractAsyncContextManager):
                await stack.enter_async_context(part)
        await stack.enter_async_context(parts.queue)
        stack.push_async_callback(_resign, parts.store, parts.lease.instance)
        yield


@asynccontextmanager
async def _running(keeper: Keeper) -> AsyncIterator[None]:
    """Have what is held renewed; at the end what is left is given back, as far as the ledger answers."""
    renewing = asyncio.create_task(keeper.run(), name="keeper")
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.wait([renewing])
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(RESIGN_S):
                await keeper.pay_all()


async def _resign(store: Store, instance: str) -> None:
    with suppress(StoreError, TimeoutError):  # then its lease runs out
        async with asyncio.timeout(RESIGN_S):
            await store.resign(instance)


def _store(settings: Settings) -> Store:
    limits: dict[str, Any] = {
        "session_ttl_s": settings.session_ttl_s,
        "task_ttl_s": settings.task_ttl_s,
        "max_session_bytes": settings.max_session_bytes,
    }
    keys = parse_seal_keys(settings.seal_keys)
    if not settings.redis_url:
        return MemoryStore(**limits)
    from realtime.store.redis import RedisStore  # its client is loaded only where it is used

    return RedisStore(settings.redis_url, **limits, sealer=AesGcm(keys) if keys else None)


def _register(settings: Settings) -> Register:
    if not settings.redis_url:
        return MemoryRegister(keep_s=settings.auth_revocation_s)
    from realtime.access.revocations_redis import RedisRegister

    return RedisRegister(settings.redis_url, keep_s=settings.auth_revocation_s)


def _rates(settings: Settings) -> Rates:
    if not settings.redis_url:
        return MemoryRates()
    from realtime.access.rates_redis import RedisRates

    return RedisRates(settings.redis_url)


def _ledger(settings: Settings) -> Ledger:
    if not settings.redis_url:
        return MemoryLedger(lease_s=settings.lease_s)
    from realtime.access.ledger_redis import RedisLedger

    return RedisLedger(settings.redis_url, lease_s=settings.lease_s)


def _allowances(settings: Settings) -> Allowances:
    return Allowances(
        responses=settings.max_responses_per_user,
        budget=parsed(settings, "token_budget", parse_budget),
        session_tokens=settings.session_token_budget or None,
        session_ttl_s=settings.session_ttl_s,
    )


def _registry(settings: Settings, tasks: Sequence[Callable[..., Any]]) -> Registry:
    """The tasks of the settings and of the application, and the built-in ones that neither has one's name of."""
    try:
        own = [*tasks, *(found := tasks_in(settings.tasks))]
    except Exception as error:  # whatever somebody's module raises
        reason = f"{type(error).__name__}: {error}"
        raise SettingsError(f"REALTIME_TASKS={','.join(settings.tasks)!r} can't be imported: {reason}") from error
    if settings.tasks and not found:
        raise SettingsError(f"REALTIME_TASKS={','.join(settings.tasks)!r} has no task: use the decorator realtime.task")
    names = {getattr(function, MARK).name for function in own if hasattr(function, MARK)}
    return Registry([*own, *(one for one in BUILTIN_TASKS if getattr(one, MARK).name not in names)])


def _queue(settings: Settings, registry: Registry) -> Queue:
    definitions = list(registry.definitions.values())
    url = settings.queue_redis_url or settings.redis_url
    if not settings.redis_url:
        return LocalQueue(definitions, slots=settings.worker_slots)
    from realtime.tasks.saq_queue import SaqQueue  # as above

    ttl_s = max(settings.task_ttl_s, settings.session_ttl_s)
    return SaqQueue(url, definitions, slots=settings.worker_slots, lease_s=settings.lease_s, ttl_s=ttl_s)


def _model(settings: Settings, responder: Responder | None) -> ModelSettings:
    default_model = "default"
    if responder is None:
        responder, default_model = choose(settings)
    return ModelSettings(
        responder=responder,
        default_model=settings.model or default_model,
        max_output_tokens=settings.max_output_tokens,
        context_tokens=settings.model_context_tokens,
        truncation=settings.truncation,
        idle_timeout_s=settings.upstream_idle_timeout_s,
        prices=parsed(settings, "prices", parse_prices),
    )


def _shortest_ttl_s(settings: Settings) -> float:
    return min(settings.session_ttl_s, settings.task_ttl_s)
