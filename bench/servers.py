"""The servers under test: how each is started on its core, and what its clients send."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.processes import SERVER_CORE, TOOLS_CORE, process_tree, raise_file_limit, running
from bench.tools import HERE, Traffic, Upstream, get, wait_for

START_TIMEOUT_S = 30.0
MANY = "1000000"
NO_LIMITS = {
    "REALTIME_MAX_CONNECTIONS": "20000",
    "REALTIME_MAX_CONNECTIONS_PER_USER": MANY,
    "REALTIME_MAX_CONNECTIONS_PER_ADDRESS": MANY,
    "REALTIME_MAX_RESPONSES_PER_USER": MANY,
    "REALTIME_MAX_TASKS_PER_USER": MANY,
    "REALTIME_RATE_RESPONSES": f"{MANY}/second",
    "REALTIME_RATE_ONESHOTS": f"{MANY}/second",
    "REALTIME_RATE_TASKS": f"{MANY}/second",
    "REALTIME_RATE_SESSIONS": f"{MANY}/second",
    "REALTIME_RATE_CONNECTIONS": f"{MANY}/second",
    "REALTIME_RATE_MESSAGES": f"{MANY}/second",
}
"""Settings under which a server holds back nobody who measures it."""
REDIS = "redis-server"
NO_REDIS = "redis-server is not installed (Debian: apt-get install redis-server)"


@dataclass(frozen=True)
class Server:
    """A running server under test: where it listens, its processes, and its store's on the tools' core, if any."""

    port: int
    pids: tuple[int, ...]
    store_pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of server. `start(upstream, directory)` runs one; its log goes to the directory."""

    name: str
    title: str
    traffic: Traffic
    start: Callable[[Upstream, Path], AbstractContextManager[Server]]


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run a server's command on the server's core until the body ends.

    Raises RuntimeError with the end of its log if it does not answer `GET /healthz` in START_TIMEOUT_S.
    """
    with running(command, core=SERVER_CORE, log=log, environment=environment) as process:
        wait_for(lambda: process.poll() is not None or answers(port), START_TIMEOUT_S)
        if process.poll() is not None or not answers(port):
            raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
        yield Server(port, tuple(process_tree(process.pid)))


def answers(port: int) -> bool:
    """Return whether a server there says that it is alive."""
    try:
        get(port, "/healthz")
    except Exception:  # whatever it is that answers so early, it is not ready
        return False
    return True


@contextmanager
def realtime(upstream: Upstream, directory: Path, settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run this project's server, its limits out of the way."""
    port = free_port()
    environment = {
        "REALTIME_RESPONDER": "anthropic",
        "ANTHROPIC_API_KEY": "bench",
        "ANTHROPIC_BASE_URL": upstream.url,
        **NO_LIMITS,
        **(settings or {}),
    }
    command = [sys.executable, "-m", "realtime", "serve", "--port", str(port)]
    with serving(command, port, directory / "realtime.log", environment) as server:
        yield server


@dataclass(frozen=True)
class Redis:
    """A running Redis without data."""

    url: str
    pid: int

    @property
    def settings(self) -> dict[str, str]:
        """What a server needs to keep its sessions there."""
        return {"REALTIME_REDIS_URL": self.url}


@contextmanager
def redis(directory: Path) -> Iterator[Redis]:
    """Run a Redis on the tools' core that writes nothing to the disk, until the body ends.

    Raises RuntimeError with its log if it does not listen in START_TIMEOUT_S.
    """
    port, log = free_port(), directory / "redis.log"
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    with running([*command, "--save", "", "--appendonly", "no"], core=TOOLS_CORE, log=log) as process:
        if not wait_for(lambda: process.poll() is not None or listens(port), START_TIMEOUT_S) or process.poll():
            raise RuntimeError(f"Redis did not start:\n{log.read_text()[-2000:]}")
        yield Redis(f"redis://127.0.0.1:{port}/0", process.pid)


def listens(port: int) -> bool:
    """Return whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def realtime_redis(upstream: Upstream, directory: Path) -> Iterator[Server]:
    """Run this project's server with its sessions in a Redis of its own."""
    with redis(directory) as store, realtime(upstream, directory, store.settings) as server:
        yield replace(server, store_pids=(store.pid,))


@contextmanager
def baseline(upstream: Upstream, directory: Path) -> Iterator[Server]:
    """Run the usual pattern under uvicorn with its defaults."""
    port = free_port()
    environment = {"ANTHROPIC_API_KEY": "bench", "ANTHROPIC_BASE_URL": upstream.url}
    command = [sys.executable, "-m", "uvicorn", "bench.baseline:app", "--port", str(port)]
    with serving(command, port, directory / "baseline.log", environment) as server:
        yield server


@contextmanager
def nginx(upstream: Upstream, directory: Path) -> Iterator[Server]:
    """Run nginx as a plain SSE proxy, its configuration and its files in the directory."""
    port = free_port()
    configuration = directory / "nginx.conf"
    configuration.write_text(nginx_configuration(port, upstream.port, directory))
    command = [nginx_program() or "nginx", "-e", str(directory / "nginx.log"), "-c", str(configuration)]
    with serving(command, port, directory / "nginx.log", {}) as server:
        yield server


def nginx_configuration(port: int, upstream_port: int, directory: Path) -> str:
    """Return the template with its `@NAMES@` filled in."""
    values = {
        "PORT": port,
        "UPSTREAM_PORT": upstream_port,
        "DIRECTORY": directory,
        "FILES": raise_file_limit(),
        "CONNECTIONS": raise_file_limit() - 100,
        "USER": "user root;" if os.geteuid() == 0 else "",
    }
    text = (HERE / "nginx.conf.template").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def nginx_program() -> str | None:
    """Return the path of nginx, which may be outside of a user's PATH; None if it is not installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def missing(kind: Kind) -> str | None:
    """Return why a kind of server can't be run here, or None."""
    if kind.name == "nginx" and nginx_program() is None:
        return "nginx is not installed (Debian: apt-get install nginx-light)"
    if kind.name == "realtime+redis" and shutil.which(REDIS) is None:
        return NO_REDIS
    if kind.name.startswith("realtime") and subprocess.run([sys.executable, "-c", "import realtime.cli"]).returncode:
        return "the package realtime can't be imported here"
    return None


def sse_request() -> str:
    """Return what a client of the plain proxy sends: the provider's own request."""
    body = '{"model":"bench","stream":true,"max_tokens":4096,"messages":[{"role":"user","content":"go"}]}'
    return (
        "POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


RESPOND = Traffic(path="/v1/realtime", frames=('{"type":"response.create","input":"go"}',))

KINDS = (
    Kind("realtime", "realtime (WebSocket)", RESPOND, realtime),
    Kind("realtime+redis", "realtime, sessions in Redis (WebSocket)", RESPOND, realtime_redis),
    Kind("baseline", "usual pattern (WebSocket)", Traffic(path="/ws", frames=('{"input":"go"}',)), baseline),
    Kind("nginx", "nginx, plain proxy (SSE)", Traffic(request=sse_request()), nginx),
)
