"""Seals what is written to Redis, so that whoever gets hold of that reads no content and can't alter any unnoticed.

A sealed value is `version, length of the key's name, the name, nonce, ciphertext, tag`: 30 bytes and the name more than
what it holds.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from realtime.errors import StoreUnreadable
from realtime.observe import logs
from realtime.settings import SettingsError, variable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = b"\x01"
"""What a sealed value begins with, and nothing else that is stored does."""
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
NAME_BYTES = 16
KEPT_SESSIONS = 4096
"""Sessions whose keys are kept ready; deriving them anew takes some microseconds."""
KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")


class Sealer(Protocol):
    """Seals values of a session. `place` says what a value is: one that was sealed for another place or another session
    is not opened. What stands where, and that nothing is missing, is not sealed."""

    def seal(self, plain: bytes, *, session_id: str, place: str) -> bytes:
        """What may be written."""

    def open(self, sealed: bytes, *, session_id: str, place: str) -> bytes:
        """What was sealed. Raises `StoreUnreadable`, and says in the log why, once for each reason."""

    def names(self, plain: bytes, *, session_id: str) -> list[bytes]:
        """The names under which something may stand that is looked for by its content: under the first it is written.
        The same content has the same names in the same session."""


class _Refusing:
    """Says why a value can't be opened: each reason once, and nothing of the value."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def _refusal(self, reason: str) -> StoreUnreadable:
        if reason not in self._told:
            self._told.add(reason)
            logs.warning("redis holds what can't be opened", reason=reason)
        return StoreUnreadable()


class Clear(_Refusing):
    """Seals nothing."""

    def seal(self, plain: bytes, *, session_id: str, place: str) -> bytes:  # noqa: ARG002  # the interface's
        """The same."""
        return plain

    def open(self, sealed: bytes, *, session_id: str, place: str) -> bytes:  # noqa: ARG002
        """The same, unless somebody else has sealed it."""
        if sealed[:1] == VERSION:
            raise self._refusal("it is sealed")
        return sealed

    def names(self, plain: bytes, *, session_id: str) -> list[bytes]:  # noqa: ARG002
        """The content itself."""
        return [plain]


class _Keys(Struct, frozen=True):
    """What one key comes to in one session."""

    cipher: AESGCM
    naming: bytes


class AesGcm(_Refusing):
    """AES-256-GCM. `keys` are 32 bytes each, by name: the first one seals, each of them opens.

    Under one key only 2^32 values may be sealed with random nonces of 96 bits (NIST SP 800-38D, section 8.3). A busy
    installation gets there within days. So each session has a key of its own, derived by HKDF-SHA256 from the named key
    and the session's id, and a session ends long before.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        from cryptography.exceptions import InvalidTag  # loaded only where something is sealed

        super().__init__()
        self._invalid = InvalidTag
        self._names = tuple(keys)
        self._head = _head(self._names[0])
        self._keys = lru_cache(KEPT_SESSIONS)(partial(_derived, dict(keys)))

    def seal(self, plain: bytes, *, session_id: str, place: str) -> bytes:
        """See `Sealer`."""
        nonce = os.urandom(NONCE_BYTES)
        cipher = self._keys(self._names[0], session_id).cipher
        return self._head + nonce + cipher.encrypt(nonce, plain, _bound(self._head, session_id, place))

    def open(self, sealed: bytes, *, session_id: str, place: str) -> bytes:
        """See `Sealer`."""
        if sealed[:1] != VERSION:
            raise self._refusal("it is not sealed")
        start = len(VERSION) + 1 + sum(sealed[1:2])
        end = start + NONCE_BYTES
        head, nonce, body = sealed[:start], sealed[start:end], sealed[end:]
        name = head[2:].decode("ascii", "replace")
        if name not in self._names:
            raise self._refusal("its key is not known here")
        if len(body) < TAG_BYTES:
            raise self._refusal("it was altered")
        try:
            return self._keys(name, session_id).cipher.decrypt(nonce, body, _bound(head, session_id, place))
        except self._invalid:
            raise self._refusal("it was altered") from None

    def names(self, plain: bytes, *, session_id: str) -> list[bytes]:
        """Keyed hashes, one by each key: nobody without the keys can try what they stand for."""
        keys = [self._keys(name, session_id).naming for name in self._names]
        return [hashlib.blake2b(plain, key=key, digest_size=NAME_BYTES).digest() for key in keys]


def parse_seal_keys(values: Sequence[str]) -> dict[str, bytes]:
    """The keys of the setting `seal_keys`, each `name:key`, by name and in their order. Raises `SettingsError`, whose
    text shows neither name nor key: which is which may be what is wrong."""
    keys: dict[str, bytes] = {}
    for number, value in enumerate(values, 1):
        name, _, text = value.partition(":")
        if not KEY_NAME.fullmatch(name):
            raise _not_allowed(number, "expected name:key, with a name of up to 32 letters, digits, - and _")
        if name in keys:
            raise _not_allowed(number, "another key has that name")
        keys[name] = _key(text, number)
    return keys


def _key(text: str, number: int) -> bytes:
    standard = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        key = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise _not_allowed(number, f"expected {KEY_BYTES} bytes in base64, as from: openssl rand -base64 {KEY_BYTES}")
    return key


def _not_allowed(number: int, why: str) -> SettingsError:
    return SettingsError(f"{variable('seal_keys')}=… is not allowed: key {number}: {why}")


def _head(name: str) -> bytes:
    return VERSION + bytes([len(name)]) + name.encode()


def _bound(head: bytes, session_id: str, place: str) -> bytes:
    """What is not in the ciphertext and has to be as it was. No session's id has a zero byte."""
    return b"%b%b\0%b" % (head, session_id.encode(), place.encode())


def _derived(keys: Mapping[str, bytes], name: str, session_id: str) -> _Keys:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"realtime store 1\0" + session_id.encode()
    both = HKDF(SHA256(), length=2 * KEY_BYTES, salt=None, info=info).derive(keys[name])
    return _Keys(AESGCM(both[:KEY_BYTES]), both[KEY_BYTES:])
