"""Tokens, good and bad, and the keys that they are signed with."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET = "a secret of no less than 32 bytes"
PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey
RSA, EC, ED = generate_rsa_key(65537, 2048), generate_private_key(SECP256R1()), Ed25519PrivateKey.generate()
PAIRS: dict[str, PrivateKey] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def claims(**more: Any) -> dict[str, Any]:
    """The claims of a good token, and more or other ones; `None` takes one away."""
    now = int(time.time())
    given = {"sub": "anna", "iat": now, "exp": now + 600, **more}
    return {name: value for name, value in given.items() if value is not None}


def token(key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None, **more: Any) -> str:
    """A signed token of `claims(**more)`."""
    return jwt.encode(claims(**more), key, algorithm, headers={"kid": kid} if kid is not None else None)


def handmade(header: str, payload: str | bytes, secret: str | bytes = SECRET) -> str:
    """A token of any header and payload, with a signature that is right for HS256."""
    signed = f"{encoded(header)}.{encoded(payload)}"
    key = secret if isinstance(secret, bytes) else secret.encode()
    return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"


def handmade_claims(**more: Any) -> str:
    """A token whose claims no library would write, signed with the secret."""
    return handmade('{"alg":"HS256"}', json.dumps(claims() | more))


def encoded(data: str | bytes) -> str:
    """Base64 as tokens have it."""
    return base64.urlsafe_b64encode(data if isinstance(data, bytes) else data.encode()).decode().rstrip("=")


def pem(key: PrivateKey) -> str:
    """The public half of a key."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def jwk(key: PrivateKey, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """The public half as a member of a set."""
    algorithms = jwt.algorithms.get_default_algorithms()
    name = next(name for name, pair in PAIRS.items() if isinstance(key, type(pair)))
    found: dict[str, Any] = json.loads(algorithms[name].to_jwk(key.public_key()))
    return {**found, **({"kid": kid} if kid is not None else {}), **more}
