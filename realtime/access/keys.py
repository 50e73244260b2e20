"""Keys that tokens are checked with. The kind of a key says which algorithm its tokens have to have; no token does."""

from __future__ import annotations

from typing import Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import HMACAlgorithm
from msgspec import Struct

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
"""Below, it can be broken; above, a check takes longer than the loop should stand still."""
MAX_KEYS = 100
UNREADABLE = (
    jwt.PyJWTError,
    msgspec.MsgspecError,
    UnsupportedAlgorithm,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    RecursionError,
)
"""What the libraries raise for keys that are none."""


class Key(Struct, frozen=True):
    """A key, parsed, with the one algorithm that it is good for."""

    algorithm: str
    value: Any


class _Jwk(Struct, frozen=True, omit_defaults=True):
    """A key of a set, as far as it counts (RFC 7517)."""

    kty: str
    kid: str | None = None
    use: str = "sig"
    alg: str | None = None
    crv: str | None = None
    n: str | None = None
    e: str | None = None
    x: str | None = None
    y: str | None = None


class _Set(Struct):
    keys: list[msgspec.Raw]


def secret_key(secret: str) -> Key:
    """A shared secret. Raises `ValueError` for what is a key of another kind: everybody may know that one."""
    try:
        value = HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ValueError("it is a key of a pair, and no secret") from None
    return Key("HS256", value)


def pem_key(pem: str) -> Key:
    r"""The public key in a PEM, whose line ends may be written as `\n`. Raises `ValueError`, in an operator's words."""
    try:
        value = load_pem_public_key(pem.replace("\\n", "\n").encode())
    except UNREADABLE:
        raise ValueError("it is no public key in PEM (-----BEGIN PUBLIC KEY-----)") from None
    return _key(value)


def jwk_set(text: bytes) -> list[tuple[str | None, Key]]:
    """The keys of a JSON Web Key Set that can be used, with their ids; others are passed over.

    Raises `ValueError` for what is no such set, or has more than `MAX_KEYS`.
    """
    try:
        keys = msgspec.json.decode(text, type=_Set).keys
    except UNREADABLE:
        raise ValueError("it is no set of keys") from None
    if len(keys) > MAX_KEYS:
        raise ValueError("too many keys")
    return [found for raw in keys if (found := _jwk(raw)) is not None]


def _jwk(raw: msgspec.Raw) -> tuple[str | None, Key] | None:
    try:
        jwk = msgspec.json.decode(raw, type=_Jwk)
        key = _key(jwt.PyJWK(msgspec.to_builtins(jwk)).key)
    except UNREADABLE:
        return None
    return (jwk.kid, key) if jwk.use == "sig" and jwk.alg in {None, key.algorithm} else None


def _key(value: Any) -> Key:
    match value:
        case RSAPublicKey(key_size=bits) if MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
            return Key("RS256", value)
        case EllipticCurvePublicKey(curve=SECP256R1()):
            return Key("ES256", value)
        case Ed25519PublicKey():
            return Key("EdDSA", value)
    raise ValueError(f"it is of another kind than RSA ({MIN_RSA_BITS} to {MAX_RSA_BITS} bits), EC P-256 and Ed25519")
