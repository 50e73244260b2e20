"""A Redis as an operator should run it: the user of the operations page, who may do what that page says, and TLS.

async with redis_server(**certificate.options) as redis:
    url = await restricted_url(redis, certificate)
    ...  # a client at that URL may do what a server and a worker need
    await nothing_was_denied(redis)
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.instance import ROOT
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

USER, PASSWORD = "realtime-server", "p%40ss"
"""The password as it is written in a URL."""


def documented_lines() -> list[list[str]]:
    """The lines of the operations page that make the user, as words; the second one is for a cluster."""
    page = (ROOT / "docs/operations.md").read_text()
    lines = re.findall(rf"^ACL SETUSER {USER} .*$", page, re.MULTILINE)
    assert len(lines) == 2
    return [line.replace("PASSWORD", PASSWORD.replace("%40", "@")).split() for line in lines]


async def restrict(redis: RedisServer, *, cluster: bool = False) -> None:
    """Make the user."""
    for line in documented_lines()[: 2 if cluster else 1]:
        await redis.command(*line)


async def nothing_was_denied(redis: RedisServer) -> None:
    """See that nobody has tried what it may not do."""
    denied = await redis.command("ACL", "LOG")
    assert not denied, denied


class Certificate:
    """A certificate of 127.0.0.1, in files of a folder. `options` are those of a Redis that shows it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.path = folder / "redis.pem"
        key_path = folder / "redis.key"
        key = ec.generate_private_key(ec.SECP256R1())
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.path.write_bytes(_signed(key).public_bytes(serialization.Encoding.PEM))
        self.options: dict[str, Any] = {
            "tls_port": str(self.port),
            "tls_cert_file": str(self.path),
            "tls_key_file": str(key_path),
            "tls_auth_clients": "no",
        }

    def url(self, login: str = f"{USER}:{PASSWORD}@") -> str:
        """The URL of a client that trusts it, and nobody else."""
        return f"rediss://{login}127.0.0.1:{self.port}/0?ssl_ca_certs={self.path}"


def _signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of a key, by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
