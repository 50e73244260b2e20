"""A provider of keys: a real HTTPS server on 127.0.0.1 whose answers are the test's."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Provider:
    """What it answers is in `status`, `headers` and `body`; `asked` counts. While `open` is not set it says nothing."""

    def __init__(self, port: int, certificate: Path) -> None:
        self.url = f"https://127.0.0.1:{port}/keys"
        self.certificate = certificate
        self.asked = 0
        self.connected = asyncio.Event()
        """Set at each request."""
        self.open = asyncio.Event()
        self.open.set()
        self.status = "200 OK"
        self.headers: list[str] = []
        self.body: bytes = b""
        self.show()

    @property
    def tls(self) -> ssl.SSLContext:
        """What trusts it."""
        return ssl.create_default_context(cafile=self.certificate)

    def show(self, *keys: dict[str, Any]) -> None:
        """Answer with these keys from now on."""
        self.status, self.headers = "200 OK", []
        self.body = json.dumps({"keys": keys}).encode()

    def fail(self, status: str = "500 Internal Server Error", *headers: str) -> None:
        """Answer with another status from now on."""
        self.status, self.headers = status, list(headers)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            self.connected.set()
            await self.open.wait()
            lines = [f"HTTP/1.1 {self.status}", f"Content-Length: {len(self.body)}", "Connection: close", *self.headers]
            writer.write("\r\n".join([*lines, "", ""]).encode() + self.body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has hung up
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()


@asynccontextmanager
async def provider(folder: Path) -> AsyncIterator[Provider]:
    """A provider that runs until the end of the block."""
    certificate, key = make_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    made: list[Provider] = []
    server = await asyncio.start_server(lambda r, w: made[0].answer(r, w), "127.0.0.1", 0, ssl=context)
    made.append(Provider(server.sockets[0].getsockname()[1], certificate))
    try:
        yield made[0]
    finally:
        made[0].open.set()
        server.close()
        await server.wait_closed()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths
