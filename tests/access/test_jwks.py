"""The keys that a provider shows: fetched over real TLS, when they have to be and no more often."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from realtime.access.jwks import FETCH_S, FetchError, Jwks
from realtime.access.keys import MAX_KEYS
from realtime.access.tokens import make_verifier
from realtime.access.verifiers import JwksVerifier, Rules
from realtime.errors import AuthenticationError, Unavailable
from realtime.settings import Settings, SettingsError
from tests.access.provider import Provider, provider
from tests.access.signing import EC, ED, PAIRS, RSA, handmade_claims, jwk, token

PATIENCE_S = 20.0


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Site:
    """A provider, and what checks tokens with its keys."""

    def __init__(self, provider: Provider, jwks: Jwks, clock: Clock) -> None:
        self.provider = provider
        self.clock = clock
        self._jwks = jwks
        self._verifier = JwksVerifier(jwks, Rules(audience="", issuer=""))

    async def asked(self) -> int:
        """How often the provider was asked, once it has answered."""
        while self._jwks._fetching is not None:
            await asyncio.wait([self._jwks._fetching])
        return self.provider.asked

    async def check(self, kid: str | None = "a", key: Any = EC, algorithm: str = "ES256") -> str:
        """Whose token of this key id this is, or the code with which it is refused."""
        try:
            return (await self._verifier.verify(token(key, algorithm, kid))).user
        except (AuthenticationError, Unavailable) as error:
            return error.code


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Site]:
    """A provider that shows one key, `a`, and keeps nobody waiting."""
    clock = Clock()
    async with provider(folder) as shown, Jwks(shown.url, tls=shown.tls, clock=clock) as jwks:
        shown.show(jwk(EC, "a"))
        yield Site(shown, jwks, clock)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is on this machine, whatever proxy the environment has."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path) as site:
        yield site


# --- which key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", PAIRS)
async def test_a_key_of_each_kind_is_found_by_its_id(site: Site, algorithm: str) -> None:
    """Among the others."""
    site.provider.show(*[jwk(key, name) for name, key in PAIRS.items()])
    assert await site.check(algorithm, PAIRS[algorithm], algorithm) == "anna"


async def test_a_token_with_the_id_of_another_key_is_refused(site: Site) -> None:
    """Also if that one is of another kind."""
    site.provider.show(jwk(RSA, "r"), jwk(ED, "e"), jwk(EC, "a"))
    assert await site.check("r") == "invalid_token"
    assert await site.check("e", EC) == "invalid_token"


async def test_a_token_without_key_id_is_checked_with_the_only_key(site: Site) -> None:
    """If there is just one."""
    assert await site.check(None) == "anna"


async def test_a_token_without_key_id_is_refused_where_there_are_several_keys(site: Site) -> None:
    """Nobody tries them all."""
    site.provider.show(jwk(EC, "a"), jwk(RSA, "b"))
    assert await site.check(None) == "invalid_token"


@pytest.mark.parametrize(
    "unusable",
    [
        {"kty": "oct", "k": "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3JldA", "kid": "b"},
        {**jwk(EC, "b"), "use": "enc"},
        {**jwk(EC, "b"), "alg": "ES384"},
        {**jwk(RSA, "b"), "alg": "PS256"},
        {**jwk(RSA, "b"), "alg": "HS256"},
        {**jwk(RSA, "b"), "n": "AQAB"},
        {**jwk(EC, "b"), "x": 1},
        {**jwk(EC, "b"), "x": "!"},
        {**jwk(EC, "b"), "crv": "P-384"},
        {**jwk(EC, "b"), "kid": 1},
        {**jwk(ED, "b"), "crv": "X25519"},
        {"kty": ["RSA"]},
        {},
        7,
    ],
)
async def test_keys_that_are_of_no_use_are_passed_over(site: Site, unusable: Any) -> None:
    """The others count, and theirs is the only one."""
    site.provider.show(unusable, jwk(EC, "a", use="sig", alg="ES256", key_ops=["verify"]))
    assert await site.check(None) == "anna"
    assert await site.check("b") == "invalid_token"


async def test_a_token_that_is_none_makes_nobody_fetch(site: Site) -> None:
    """It is refused before."""
    verifier = site._verifier
    for text in ("", "a.b.c", "e30.e30.e30" * 1000, handmade_claims()[:-1] + "!"):
        with pytest.raises(AuthenticationError):
            await verifier.verify(text)
    assert site.provider.asked == 0


# --- when they are fetched -------------------------------------------------------------------------------------------


async def test_keys_are_fetched_once_in_five_minutes(site: Site) -> None:
    """However many tokens are checked."""
    for _ in range(3):
        assert await site.check() == "anna"
    site.clock.now += 299
    assert await site.check() == "anna"
    assert await site.asked() == 1
    site.clock.now += 2
    assert await site.check() == "anna"
    assert await site.asked() == 2


@pytest.mark.parametrize(
    ("cache_control", "age_s"), [("public, max-age=60", 60), ("max-age=1", 30), ("max-age=9999", 300)]
)
async def test_the_provider_may_ask_for_less(site: Site, cache_control: str, age_s: int) -> None:
    """But not for less than half a minute."""
    site.provider.headers = [f"Cache-Control: {cache_control}"]
    await site.check()
    site.clock.now += age_s - 1
    await site.check()
    assert await site.asked() == 1
    site.clock.now += 2
    await site.check()
    assert await site.asked() == 2


async def test_a_hundred_checks_at_once_are_one_fetch(site: Site) -> None:
    """All wait for the same one."""
    site.provider.open.clear()
    checks = [asyncio.create_task(site.check()) for _ in range(100)]
    async with asyncio.timeout(PATIENCE_S):
        await site.provider.connected.wait()
        site.provider.open.set()
        assert set(await asyncio.gather(*checks)) == {"anna"}
    assert site.provider.asked == 1


async def test_who_stops_waiting_stops_nobody_else(site: Site) -> None:
    """The fetch goes on for the others."""
    site.provider.open.clear()
    first, second = asyncio.create_task(site.check()), asyncio.create_task(site.check())
    async with asyncio.timeout(PATIENCE_S):
        await site.provider.connected.wait()
        first.cancel()
        await asyncio.wait([first])
        site.provider.open.set()
        assert await second == "anna"
    assert site.provider.asked == 1


async def test_a_new_key_is_found_at_once(site: Site) -> None:
    """Half a minute after the last fetch, at the earliest."""
    assert await site.check() == "anna"
    site.provider.show(jwk(EC, "a"), jwk(RSA, "b"))
    assert await site.check("b", RSA, "RS256") == "invalid_token"
    site.clock.now += 30
    assert await site.check("b", RSA, "RS256") == "anna"
    assert site.provider.asked == 2


async def test_made_up_key_ids_make_one_fetch_in_half_a_minute(site: Site) -> None:
    """However many there are."""
    for second in range(60):
        assert await site.check(f"made-up-{second}") == "invalid_token"
        site.clock.now += 1
    assert site.provider.asked == 2


async def test_a_key_that_is_gone_is_not_believed_any_more(site: Site) -> None:
    """From the next fetch on."""
    assert await site.check() == "anna"
    site.provider.show()
    site.clock.now += 361
    assert await site.check() == "invalid_token"
    assert await site.check() == "invalid_token"
    assert site.provider.asked == 2


async def test_nobody_waits_for_newer_keys_while_the_old_ones_count(site: Site) -> None:
    """A provider that is slow holds up no login; what it says counts as soon as it is there."""
    assert await site.check() == "anna"
    site.provider.open.clear()
    site.clock.now += 301
    for _ in range(3):
        assert await site.check() == "anna"
    site.provider.show()
    site.provider.open.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await site.asked() == 2
    assert await site.check() == "invalid_token"


# --- when they can't be ----------------------------------------------------------------------------------------------


async def test_without_keys_nobody_is_refused_for_good(site: Site) -> None:
    """It is not the token's fault: a later try may do, and needs no new token."""
    site.provider.fail()
    with pytest.raises(Unavailable) as refused:
        await site._verifier.verify(token(EC, "ES256", "a"))
    assert (refused.value.code, refused.value.status) == ("auth_unavailable", 503)
    assert refused.value.retry_after_ms is not None
    assert 0 < refused.value.retry_after_ms <= 5001
    site.provider.show(jwk(EC, "a"))
    site.clock.now += 5.1
    assert await site.check() == "anna"


async def test_a_provider_that_fails_is_not_asked_for_each_token(site: Site) -> None:
    """Every five seconds is often enough."""
    site.provider.fail()
    for _ in range(10):
        assert await site.check() == "auth_unavailable"
    assert site.provider.asked == 1


async def test_keys_outlive_their_provider_by_an_hour(site: Site) -> None:
    """A user does not notice that it is away."""
    assert await site.check() == "anna"
    site.provider.fail()
    for _ in range(11):
        site.clock.now += 320
        assert await site.check() == "anna"
    site.clock.now += 320
    assert await site.check() == "auth_unavailable"


async def test_while_the_provider_fails_nobody_can_tell_that_a_key_is_unknown(site: Site) -> None:
    """It may be a new one."""
    assert await site.check() == "anna"
    site.provider.fail()
    site.clock.now += 31
    assert await site.check("b") == "auth_unavailable"
    assert await site.check("a") == "anna"


BAD_ANSWERS: dict[str, tuple[str, bytes]] = {
    "nothing": ("200 OK", b""),
    "no JSON": ("200 OK", b"<html>"),
    "no set": ("200 OK", b'{"keys": {}}'),
    "another object": ("200 OK", b"{}"),
    "something deep": ("200 OK", b'{"keys":' + b"[" * 100_000),
    "more than 256 KiB": ("200 OK", b'{"keys": []}' + b" " * 256 * 1024),
    "too many keys": ("200 OK", b'{"keys": [' + b",".join([b"{}"] * (MAX_KEYS + 1)) + b"]}"),
    "another status": ("404 Not Found", b'{"keys": []}'),
    "no HTTP": ("canary", b""),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_an_answer_that_is_none_is_a_failure(site: Site, name: str) -> None:
    """Keys that were good before go on being used."""
    assert await site.check() == "anna"
    site.provider.status, site.provider.body = BAD_ANSWERS[name]
    site.clock.now += 301
    assert await site.check() == "anna"
    assert await site.check("b") == "auth_unavailable"
    assert site.provider.asked == 2


async def test_redirects_lead_nowhere(site: Site) -> None:
    """Keys come from where the operator said."""
    site.provider.fail("302 Found", f"Location: {site.provider.url}")
    assert await site.check() == "auth_unavailable"
    assert site.provider.asked == 1


async def test_a_provider_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds, in all."""
    assert FETCH_S == 5
    monkeypatch.setattr("realtime.access.jwks.FETCH_S", 0.2)
    async with running(tmp_path) as site, asyncio.timeout(PATIENCE_S):
        site.provider.open.clear()
        assert await site.check() == "auth_unavailable"


async def test_leaving_ends_a_fetch(tmp_path: Path) -> None:
    """Nothing goes on after the end."""
    async with provider(tmp_path) as shown:
        shown.open.clear()
        async with Jwks(shown.url, tls=shown.tls) as jwks, asyncio.timeout(PATIENCE_S):
            waiting = asyncio.create_task(jwks.key("a"))
            await shown.connected.wait()
        await asyncio.wait([waiting], timeout=PATIENCE_S)
        assert waiting.cancelled()


async def test_a_provider_that_nobody_vouches_for_is_not_believed(tmp_path: Path) -> None:
    """Its certificate counts."""
    async with provider(tmp_path) as shown, Jwks(shown.url, tls=ssl.create_default_context()) as jwks:
        with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
            await jwks.fetch()
        assert shown.asked == 0


# --- by the settings -------------------------------------------------------------------------------------------------


async def test_the_environment_may_name_who_vouches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SSL_CERT_FILE`, as everywhere."""
    async with provider(tmp_path) as shown:
        shown.show(jwk(EC, "a"))
        monkeypatch.setenv("SSL_CERT_FILE", str(shown.certificate))
        verifier = make_verifier(Settings(auth_jwks_url=shown.url))
        assert verifier is not None
        assert isinstance(verifier, AbstractAsyncContextManager)
        async with verifier:
            assert (await verifier.verify(token(EC, "ES256", "a"))).user == "anna"


async def test_an_environment_that_will_not_do_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, not at the first token."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/at/all.pem")
    with pytest.raises(SettingsError, match="can't be asked for keys: FileNotFoundError"):
        async with Jwks("https://127.0.0.1/keys"):
            pass
