"""A real nginx on the configuration that is shipped, in front of some ports of 127.0.0.1.

async with nginx(one.port, two.port) as proxy:
    ...  # connect to proxy.ws_url
    assert "/v1/realtime" in await proxy.logged('"status":101')
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.support.ports import free_port
from tests.support.programs import program

CONFIGURATION = Path(__file__).resolve().parents[2] / "nginx" / "nginx.conf"
FOREGROUND = ("-g", "daemon off;")
START_S = 30.0
END_S = 30.0
POLL_S = 0.005
PATIENCE_S = 20.0
SERVERS = re.compile(r"^( *)server realtime-1:8000(.*);\n(?: *server realtime-\d+:8000.*;\n)*", re.MULTILINE)
"""The instances that an upstream lists."""


class Nginx:
    """A running nginx: `url` and `ws_url` are for clients."""

    def __init__(self, folder: Path, port: int, process: asyncio.subprocess.Process) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.ws_url = f"ws://127.0.0.1:{port}/v1/realtime"
        self._folder = folder
        self._process = process

    @property
    def access_log(self) -> list[str]:
        """The lines about requests that have ended."""
        return (self._folder / "stdout").read_text().splitlines()

    @property
    def error_log(self) -> list[str]:
        """Everything else that it has written."""
        return (self._folder / "stderr").read_text().splitlines()

    async def logged(self, part: str, *, times: int = 1) -> str:
        """The last line of the access log that holds `part`, once there are so many. Raises `TimeoutError`."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = [line for line in self.access_log if part in line]
                if len(found) >= times:
                    return found[-1]
                await asyncio.sleep(POLL_S)

    def take_its_files(self) -> None:
        """Remove the folder that large bodies would be written to: nothing can be written there any more."""
        shutil.rmtree(self._folder / "client_body")

    async def quit(self) -> int:
        """SIGQUIT, by which its image is stopped: it ends what is going on, in time. Returns its status."""
        self._process.send_signal(signal.SIGQUIT)
        async with asyncio.timeout(END_S):
            return await self._process.wait()

    async def _up(self) -> None:
        """Return once it takes connections. Raises `RuntimeError` if it ends instead."""
        async with asyncio.timeout(START_S):
            while not _listens(self.port):
                if self._process.returncode is not None:
                    raise RuntimeError("nginx ended:\n" + "\n".join(self.error_log))
                await asyncio.sleep(POLL_S)

    async def _end(self) -> None:
        """End it, with its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def nginx(
    *upstream_ports: int, replacing: Mapping[str, str] | None = None, options: Sequence[str] = FOREGROUND
) -> AsyncIterator[Nginx]:
    """An nginx that takes connections, in front of `upstream_ports`.

    `replacing` are more changes of its configuration, `options` those of its command line.

    Raises:
        RuntimeError: it does not come up; the text says why.
    """
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder, port = Path(name), free_port()
        (folder / "nginx.conf").write_text(configuration(folder, port, upstream_ports, replacing))
        with (folder / "stderr").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command(folder, options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        proxy = Nginx(folder, port, process)
        try:
            await proxy._up()
            yield proxy
        finally:
            await proxy._end()


def configuration(
    folder: Path, port: int, upstream_ports: Sequence[int], replacing: Mapping[str, str] | None = None
) -> str:
    """The shipped configuration with what is marked HERE changed: the instances, the port, where files go.

    Raises:
        ValueError: something that has to be changed is not there.
    """
    servers = "".join(rf"\1server 127.0.0.1:{upstream_port}\2;\n" for upstream_port in upstream_ports)
    text, upstreams = SERVERS.subn(servers, CONFIGURATION.read_text())
    if upstreams != 2:
        raise ValueError(f"{upstreams} upstreams list realtime-1:8000, expected 2")
    changes = {
        " listen 8080 ": f" listen 127.0.0.1:{port} ",
        "pid /tmp/": f"pid {folder}/",
        "_temp_path /tmp/": f"_temp_path {folder}/",
        "access_log /dev/stdout": f"access_log {folder}/stdout",
    }
    return _replaced(text, {**changes, **(replacing or {})})


def command(folder: Path, options: Sequence[str] = FOREGROUND) -> list[str]:
    """The command that runs nginx on the configuration in a folder."""
    *others, directives = options
    if os.geteuid() == 0:
        directives += " user root;"  # its workers would be somebody else, to whom a test's folder is closed
    return [program("nginx"), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf"), *others, directives]


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    """`text` with each key of `changes` replaced, everywhere."""
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{old!r} is not in the configuration")
        text = text.replace(old, new)
    return text


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
