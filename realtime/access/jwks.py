"""The public keys that a provider shows at a URL: fetched when they are needed, kept, and not asked for too often."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Self

from realtime.access.claims import invalid_token
from realtime.access.keys import Key, jwk_set
from realtime.errors import Unavailable
from realtime.observe import logs
from realtime.settings import SettingsError

if TYPE_CHECKING:
    import httpx2

FETCH_S = 5.0
"""How long a fetch may take, in all."""
MAX_BYTES = 256 * 1024
"""The longest answer that is read."""
MAX_AGE_S = 300.0
"""How long keys are good, at most; the provider may say less, but not less than `MIN_AGE_S`."""
MIN_AGE_S = 30.0
GRACE_S = 60.0
"""How much longer they count while newer ones are on their way: nobody waits for a slow provider then."""
STALE_S = 3600.0
"""How long they are good while the provider can't be asked."""
AGAIN_S = 30.0
"""How long after a fetch the next one may be for a key that is not there: ids are easily made up."""
AGAIN_WITHOUT_KEYS_S = 5.0
"""How long after a fetch that failed, where there is no key at all."""


class FetchError(Exception):
    """There were no keys at the URL; the text says why, and holds nothing that was fetched."""


class Jwks:
    """The keys at `url`, by their ids. `async with` owns the HTTP client; it raises `SettingsError`.

    `tls` decides which certificates count; by default those of the system, or of `SSL_CERT_FILE`. Proxies are the
    environment's. `clock` gives monotonic seconds.
    """

    def __init__(
        self, url: str, *, tls: ssl.SSLContext | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._tls = tls
        self._clock = clock
        self._client: httpx2.AsyncClient | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._keys: list[tuple[str | None, Key]] = []
        self._fetched_at = self._fresh_until = self._tried_at = float("-inf")
        self._failed = False
        """Whether the newest fetch did."""

    async def __aenter__(self) -> Self:
        try:
            self._client = await asyncio.to_thread(self._make_client)
        except (ValueError, ImportError, OSError) as error:  # of the proxy's variable, or of SSL_CERT_FILE
            raise SettingsError(f"{self._url} can't be asked for keys: {type(error).__name__}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
        if self._client is not None:
            await self._client.aclose()

    async def key(self, kid: str | None) -> Key:
        """The key of that id; without an id the only key, if there is just one. To cancel it is safe.

        Raises `AuthenticationError` if there is no such key, and `Unavailable` if that can't be found out now.
        """
        if self._fetching is None and self._should_fetch(kid):
            self._fetching = asyncio.create_task(self._fetch(), name="fetch the keys of tokens", context=Context())
        if self._fetching is not None and (self._find(kid) is None or self._clock() >= self._fresh_until + GRACE_S):
            await asyncio.shield(self._fetching)
        found = self._find(kid)
        if found is not None:
            return found
        if self._failed:
            wait_s = max(0.0, self._next_try() - self._clock())
            raise Unavailable(
                "auth_unavailable", "Tokens can't be checked at the moment.", retry_after_ms=round(wait_s * 1000) + 1
            )
        raise invalid_token()

    async def fetch(self) -> int:
        """Fetch the keys; returns how many can be used. Raises `FetchError`."""
        self._tried_at = self._clock()
        try:
            async with asyncio.timeout(FETCH_S):
                text, max_age_s = await self._get()
            self._keys = jwk_set(text)
        except ValueError:
            raise FetchError("what is there is no set of keys") from None
        except TimeoutError:
            raise FetchError(f"no answer within {FETCH_S:.0f} s") from None
        self._fetched_at = self._clock()
        self._fresh_until = self._fetched_at + max_age_s
        return len(self._keys)

    async def _fetch(self) -> None:
        """As `fetch`, and never fails; the log tells when it begins to, and when it ends."""
        try:
            await self.fetch()
        except FetchError as error:
            if not self._failed:
                logs.warning("keys of tokens can't be fetched", reason=str(error))
            self._failed = True
        else:
            if self._failed:
                logs.info("keys of tokens are fetched again")
            self._failed = False
        finally:
            self._fetching = None

    async def _get(self) -> tuple[bytes, float]:
        """What is at the URL, and for how many seconds it is good."""
        import httpx2

        assert self._client is not None, "not entered"
        try:
            # Not compressed: some bytes could become very many.
            async with self._client.stream("GET", self._url, headers={"accept-encoding": "identity"}) as response:
                if response.status_code != 200:
                    raise FetchError(f"HTTP status {response.status_code}")
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise FetchError(f"more than {MAX_BYTES} bytes")
                return bytes(body), _age_s(response.headers.get("cache-control", ""))
        except httpx2.ConnectError as error:  # in the words of this machine
            raise FetchError(str(error)) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise FetchError(type(error).__name__) from None

    def _make_client(self) -> httpx2.AsyncClient:
        """In a thread: the import takes tenths of a second, and the certificates are read from the disk."""
        import httpx2

        limits = httpx2.Limits(max_keepalive_connections=0)
        return httpx2.AsyncClient(verify=self._tls or True, timeout=FETCH_S, limits=limits, follow_redirects=False)

    def _should_fetch(self, kid: str | None) -> bool:
        return (not self._is_fresh() or self._find(kid) is None) and self._clock() >= self._next_try()

    def _next_try(self) -> float:
        lacks_keys = self._failed and not self._usable()
        return self._tried_at + (AGAIN_WITHOUT_KEYS_S if lacks_keys else AGAIN_S)

    def _is_fresh(self) -> bool:
        return self._clock() < self._fresh_until

    def _usable(self) -> list[tuple[str | None, Key]]:
        return self._keys if self._clock() < self._fetched_at + STALE_S else []

    def _find(self, kid: str | None) -> Key | None:
        usable = self._usable()
        if kid is None:
            return usable[0][1] if len(usable) == 1 else None
        return next((key for name, key in usable if name == kid), None)


def _age_s(cache_control: str) -> float:
    """For how many seconds an answer is good, by its `Cache-Control`."""
    found = re.search(r"(?:^|[\s,])max-age=(\d{1,9})", cache_control, re.IGNORECASE)
    return min(MAX_AGE_S, max(MIN_AGE_S, float(found[1]))) if found else MAX_AGE_S
