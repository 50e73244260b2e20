"""`realtime check`: looks over what a server would be started with, and says what is wrong and what to do about it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from realtime.access.rates import parse_rate
from realtime.access.tokens import is_configured, make_verifier
from realtime.errors import StoreError
from realtime.extras import missing
from realtime.observe import traces
from realtime.responders.choose import choose
from realtime.responders.demo import demo
from realtime.settings import Settings, SettingsError, load_settings, parsed, unknown_settings, variable

REDIS_S = 2.0
"""How long Redis may take to answer."""
MIN_REDIS = 7


class Finding(Struct, frozen=True):
    """One line: whether something is as it should be, and if not, what to do."""

    status: Literal["ok", "warning", "wrong"]
    about: str
    text: str


def run(environ: Mapping[str, str] = os.environ) -> int:
    """Print what is found, a line each. Returns the exit status: 1 if anything is wrong."""
    found = asyncio.run(findings(environ))
    for one in found:
        print(f"{one.status:8} {one.about:9} {one.text}")
    return 1 if any(one.status == "wrong" for one in found) else 0


def check_reach(settings: Settings) -> None:
    """Raise `SettingsError` for a server that others can reach, and that asks nobody who they are."""
    if not is_configured(settings) and not _is_loopback(settings.host):
        raise SettingsError(
            f"REALTIME_HOST={settings.host!r} can be reached by others, and there is no authentication: "
            "set REALTIME_AUTH_SECRET, bind to 127.0.0.1, or give --insecure-no-auth if that is meant"
        )


async def findings(environ: Mapping[str, str]) -> list[Finding]:
    """What there is to say of an environment. Asks Redis, and the provider of the keys that tokens are checked with."""
    unknown = [
        Finding("warning", "settings", f"{name} is no setting: is it spelled wrong?")
        for name in unknown_settings(environ)
    ]
    try:
        settings = load_settings(environ)
    except SettingsError as error:
        return [*unknown, Finding("wrong", "settings", str(error))]
    problem = await asyncio.to_thread(_composed, settings)  # it imports tasks
    return [
        *unknown,
        *([Finding("wrong", "settings", problem)] if problem else []),
        *([] if unknown or problem else [Finding("ok", "settings", "each of them is allowed")]),
        *[finding async for finding in _store(settings)],
        *_model(settings, environ),
        *[finding async for finding in _auth(settings)],
        *_limits(settings),
        *_sealing(settings),
    ]


def _composed(settings: Settings) -> str:
    """What keeps a server from being composed of these settings, if anything does, but for the model and the tokens."""
    from realtime.access.edge import edge
    from realtime.parts import make_admission, make_parts

    others = _without_keys(settings)
    try:
        make_admission(make_parts(others, demo, ()), others)
        traces.check(settings.traces)
        edge(_nothing, settings)
        parsed(settings, "rate_connections", parse_rate)
    except SettingsError as error:
        return str(error)
    return ""


def _without_keys(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, auth_secret="", auth_public_key="", auth_jwks_url="")


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """An application that the edge could stand before."""


async def _store(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.redis_url:
        yield Finding(
            "warning", "store", "sessions are kept in this process, and end with it: REALTIME_REDIS_URL keeps them"
        )
        if settings.queue_redis_url:
            yield Finding("warning", "queue", "REALTIME_QUEUE_REDIS_URL is of no use without REALTIME_REDIS_URL")
        return
    if missing("redis"):
        return  # which is said of the settings
    yield await _redis("store", "redis_url", settings.redis_url)
    name = "queue_redis_url" if settings.queue_redis_url else "redis_url"
    queue = await _redis("queue", name, settings.queue_redis_url or settings.redis_url)
    yield queue
    if queue.status == "ok" and (waiting := await _waiting(settings)):
        text = f"{waiting} wait, and no worker runs them: start realtime worker, with the same REALTIME_TASKS"
        yield Finding("warning", "tasks", text)


async def _waiting(settings: Settings) -> int:
    """How many tasks wait that nobody is there to run; 0 where that can't be known, which is said of something else."""
    from realtime.parts import make_parts

    with suppress(SettingsError, StoreError):
        parts = await asyncio.to_thread(make_parts, _without_keys(settings), demo, ())
        async with parts.queue as queue:
            return await queue.unattended()
    return 0


async def _redis(about: str, name: str, url: str) -> Finding:
    """How the Redis at `url` does, which may hold a password and is not repeated."""
    from redis.exceptions import AuthenticationError, RedisError, ResponseError

    where = f"{variable(name)} ({urlsplit(url).netloc.rpartition('@')[2]})"
    try:
        async with asyncio.timeout(REDIS_S):
            info = await _info(url)
    except (AuthenticationError, ResponseError) as error:
        return Finding("wrong", about, f"{where} refuses: {error}; see its password, and its user's rights")
    except (RedisError, OSError, ValueError) as error:
        kind = type(error).__name__
        return Finding("wrong", about, f"{where} does not answer ({kind}): start it, or correct the address")
    problem = _redis_problem(about, info)
    return Finding("wrong", about, f"{where} {problem}") if problem else Finding("ok", about, f"{where} answers")


async def _info(url: str) -> dict[str, Any]:
    import redis
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    driver = redis.DriverInfo(lib_version=redis.__version__)  # by itself it looks for the version on the disk
    async with Redis.from_url(url, retry=Retry(NoBackoff(), 0), driver_info=driver) as client:
        await client.ping()
        info: dict[str, Any] = await client.info()
        return info


def _redis_problem(about: str, info: dict[str, Any]) -> str:
    version, policy = str(info.get("redis_version", MIN_REDIS)), info.get("maxmemory_policy", "noeviction")
    if int(version.partition(".")[0]) < MIN_REDIS:
        return f"is Redis {version}: {MIN_REDIS} or newer is needed"
    if policy != "noeviction":
        return f"throws data away when it is full ({policy}): set maxmemory-policy to noeviction"
    if about == "queue" and info.get("cluster_enabled"):
        return "is a cluster, which the queue of tasks can't use: set REALTIME_QUEUE_REDIS_URL to a single server"
    return ""


def _model(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        responder, default_model = choose(settings, environ)
    except SettingsError as error:
        yield Finding("wrong", "model", str(error))
        return
    if responder is demo:
        why = "as REALTIME_RESPONDER says" if settings.responder == "demo" else "as no provider's key is set"
        yield Finding("warning", "model", f"the demo responder answers, {why}")
    else:
        yield Finding("ok", "model", f"{settings.model or default_model} answers; whether the key is good is not tried")


async def _auth(settings: Settings) -> AsyncIterator[Finding]:
    try:
        make_verifier(settings)
        check_reach(settings)
    except SettingsError as error:
        yield Finding("wrong", "tokens", str(error))
        return
    if settings.auth_jwks_url:
        yield await _keys(settings.auth_jwks_url)
    elif is_configured(settings):
        yield Finding("ok", "tokens", "everybody has to show one")
    else:
        yield Finding(
            "warning", "tokens", "nobody has to show one, so only this machine is served: REALTIME_AUTH_SECRET"
        )
    if is_configured(settings) and not settings.auth_secret and not settings.auth_audience:
        yield Finding("warning", "tokens", "those made for others are good here, too: set REALTIME_AUTH_AUDIENCE")


async def _keys(url: str) -> Finding:
    from realtime.access.jwks import FetchError, Jwks

    try:
        async with Jwks(url) as keys:
            count = await keys.fetch()
    except (FetchError, SettingsError) as error:
        return Finding("wrong", "tokens", f"REALTIME_AUTH_JWKS_URL: {error}; no token can be checked without the keys")
    if count == 0:
        return Finding("wrong", "tokens", "REALTIME_AUTH_JWKS_URL has no key of RSA, EC P-256 or Ed25519")
    return Finding("ok", "tokens", f"everybody has to show one; REALTIME_AUTH_JWKS_URL has {count} keys for them")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _limits(settings: Settings) -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files <= settings.max_connections:
        text = (
            f"REALTIME_MAX_CONNECTIONS={settings.max_connections} needs more open files than {files}: raise ulimit -n"
        )
        yield Finding("warning", "limits", text)
    if not settings.token_budget:
        text = f"{settings.rate_responses} responses for each user, of any number of tokens: see REALTIME_TOKEN_BUDGET"
        yield Finding("warning", "limits", text)
    else:
        yield Finding(
            "ok", "limits", f"{settings.rate_responses} responses, {settings.token_budget} tokens for each user"
        )


def _sealing(settings: Settings) -> Iterator[Finding]:
    if settings.seal_keys:
        yield Finding("ok", "sealing", f"content in Redis is sealed; {len(settings.seal_keys)} keys open it")
    elif settings.redis_url:
        yield Finding("warning", "sealing", "content stands in Redis as it is: REALTIME_SEAL_KEYS seals it")
