"""The real `python -m realtime chat`, in a pipe and in a terminal, against a running server."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import socket
import sys
import termios
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.end_to_end import Model, echo
from tests.support.no_websockets import without_websockets
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import TcpProxy

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 20.0
"""A process has to start, on a machine that may be busy."""
LOST = "[connection lost, coming back]"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def command(url: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "realtime", "chat", "--url", url, *arguments]


@asynccontextmanager
async def started(process: Process) -> AsyncIterator[Process]:
    """End the process with the block, whatever happens in it."""
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def piped(url: str, text: str, *arguments: str) -> AsyncIterator[Process]:
    """The client with `text` as all of its input."""
    process = await asyncio.create_subprocess_exec(
        *command(url, *arguments), stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=ROOT, env=ENVIRONMENT
    )
    async with started(process):
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.write_eof()
        yield process


async def output_of(process: Process) -> tuple[str, str]:
    """What the process wrote until its end: to standard output, and to standard error."""
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return out.decode(), err.decode()


class Terminal:
    """What a person has in front of them: keys, and a screen."""

    def __init__(self, master: int, process: Process) -> None:
        self.screen = ""
        self._master = master
        self._process = process
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    def type(self, keys: str) -> None:
        """Press keys; Enter is a line end, Ctrl-C and Ctrl-D are their control characters."""
        os.write(self._master, keys.encode())

    async def shows(self, text: str) -> None:
        """Return once the screen has this text."""
        async with asyncio.timeout(PATIENCE_S):
            while text not in self.screen:
                self._changed.clear()
                await self._changed.wait()

    async def left(self) -> int:
        """The exit status, once the client has ended."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the client has closed its side
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._master)
        self.screen += data.decode().replace("\r\n", "\n")
        self._changed.set()


@contextmanager
def terminal_pair() -> Iterator[tuple[int, int]]:
    """A person's side of a terminal and a program's."""
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)


@asynccontextmanager
async def terminal(url: str, *arguments: str) -> AsyncIterator[Terminal]:
    """The client in a terminal, once it has told its session or ended."""
    loop = asyncio.get_running_loop()
    with terminal_pair() as (master, slave):
        try:
            process = await asyncio.create_subprocess_exec(
                *command(url, *arguments),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=ROOT,
                env=ENVIRONMENT,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
            )
        finally:
            os.close(slave)
        async with started(process):
            screen = Terminal(master, process)
            try:
                await screen.shows("Ctrl-C stops")
                yield screen
            finally:
                loop.remove_reader(master)


@asynccontextmanager
async def proxied(server: RunningServer) -> AsyncIterator[tuple[TcpProxy, str]]:
    """A network between the client and the server, and the address to give to the client."""
    async with TcpProxy("127.0.0.1", server.port) as proxy:
        yield proxy, f"http://127.0.0.1:{proxy.port}"


# --- in a pipe -------------------------------------------------------------------------------------------------------


async def test_a_pipe_is_answered() -> None:
    """Standard input has ended long before the answer comes; it is printed whole, and then the status is 0."""
    model = Model()
    async with running_server(model) as server, piped(server.url, "hello\n") as process:
        turn = await model.turn()
        turn.say("one ")
        turn.end("two")
        out, err = await output_of(process)
        assert turn.conversation == [("user", "hello")]
        assert out == "one two\n"
        assert err.startswith("[session sess_")
        assert err.count("\n") == 1
        assert process.returncode == 0


async def test_the_last_line_needs_no_end() -> None:
    """`printf hello` says something, too."""
    async with running_server(echo) as server, piped(server.url, "hello") as process:
        out, _ = await output_of(process)
        assert out.endswith("hello\n")
        assert process.returncode == 0


async def test_a_line_that_is_too_long_is_refused() -> None:
    """In words; the next one is said."""
    async with running_server(echo) as server, piped(server.url, "long" * 20_000 + "\nshort\n") as process:
        out, err = await output_of(process)
        assert "the limit is" in err
        assert (out, process.returncode) == ("short\n", 0)


async def test_every_line_of_a_pipe_is_answered() -> None:
    """In their order: a script's next line does not interrupt the answer to the one before."""
    async with running_server(echo) as server, piped(server.url, "first\nsecond\nthird\n") as process:
        out, _ = await output_of(process)
        assert out.endswith("first\nsecond\nthird\n")
        assert process.returncode == 0


async def test_an_empty_pipe_asks_nothing() -> None:
    """No input, no answer, no error."""
    model = Model()
    async with running_server(model) as server, piped(server.url, "") as process:
        await output_of(process)
        assert process.returncode == 0
        assert model.calls == 0


async def test_a_session_is_gone_on_with() -> None:
    """What was said in it is shown, and the model gets it."""
    model = Model()
    async with running_server(model) as server:
        async with piped(server.url, "hello\n") as process:
            (await model.turn()).end("hi there")
            _, err = await output_of(process)
        session_id = err.split("session ")[1].split(";")[0]
        async with piped(server.url, "again\n", "--session", session_id) as process:
            turn = await model.turn()
            turn.end("still here")
            out, _ = await output_of(process)
        assert turn.conversation == [("user", "hello"), ("assistant", "hi there"), ("user", "again")]
        assert "anonymous> hello\nhi there\n" in out
        assert out.endswith("still here\n")


async def test_ctrl_c_ends_a_script() -> None:
    """There the signal is for the whole pipeline: it ends without a traceback."""
    model = Model()
    async with running_server(model) as server, piped(server.url, "hello\n") as process:
        await model.turn()
        process.send_signal(signal.SIGINT)
        _, err = await output_of(process)
        assert "Traceback" not in err
        assert process.returncode == 130


@asynccontextmanager
async def bouncer(code: int) -> AsyncIterator[tuple[str, list[str | None]]]:
    """A server that closes each connection with this code, and what each had for a token."""
    shown: list[str | None] = []

    async def bounce(connection: ServerConnection) -> None:
        assert connection.request is not None
        shown.append(connection.request.headers.get("Authorization"))
        await connection.close(code)

    async with serve(bounce, "127.0.0.1", 0, subprotocols=[Subprotocol("realtime.v1")]) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", shown


async def test_a_token_is_shown_and_its_refusal_is_told() -> None:
    """It is not asked for again and again, and not repeated."""
    async with bouncer(4401) as (url, shown), piped(url, "hello\n", "--token", "a.b.c") as process:
        _, err = await output_of(process)
    assert shown == ["Bearer a.b.c"]
    assert "--token" in err
    assert "a.b.c" not in err
    assert process.returncode == 1


async def test_a_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody else can read it."""
    monkeypatch.setitem(ENVIRONMENT, "REALTIME_TOKEN", "d.e.f")
    async with bouncer(4403) as (url, shown), piped(url, "hello\n") as process:
        await output_of(process)
    assert shown == ["Bearer d.e.f"]


async def test_what_is_no_token_is_not_sent() -> None:
    """It could be a header more."""
    async with bouncer(4401) as (url, shown), piped(url, "hello\n", "--token", "a\r\nb: c") as process:
        _, err = await output_of(process)
    assert shown == []
    assert err.startswith("That is no token")
    assert process.returncode == 1


# --- in a terminal ---------------------------------------------------------------------------------------------------


async def test_ctrl_c_stops_the_answer_and_then_leaves() -> None:
    """The first closes the model call and keeps the session; the second ends the client, with status 0."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        screen.type("hello\n")
        turn = await model.turn()
        turn.say("this goes on")
        await screen.shows("this goes on")
        screen.type("\x03")
        async with asyncio.timeout(PATIENCE_S):
            await turn.closed.wait()
        await screen.shows(" [cancelled]\n")
        screen.type("\x03")
        assert await screen.left() == 0
        assert "Traceback" not in screen.screen


async def test_ctrl_d_leaves() -> None:
    """At the beginning of a line, with status 0, and without the answer that still runs: its model call is closed."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        screen.type("hello\n")
        turn = await model.turn()
        screen.type("\x04")
        assert await screen.left() == 0
        async with asyncio.timeout(PATIENCE_S):
            await turn.closed.wait()


async def test_saying_something_interrupts() -> None:
    """The first answer is cancelled, the second one comes."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        screen.type("first\n")
        turn = await model.turn()
        turn.say("the first answer")
        await screen.shows("the first answer")
        screen.type("second\n")
        (await model.turn()).end("the second answer")
        await screen.shows("[cancelled]\n")
        await screen.shows("the second answer\n")
        assert turn.closed.is_set()


# --- over a bad network ----------------------------------------------------------------------------------------------


async def test_a_cut_connection_leaves_no_seam() -> None:
    """The answer goes on at the character where it was cut, and the model is asked once. A pipe shows no seam."""
    model = Model()
    async with (
        running_server(model) as server,
        proxied(server) as (proxy, url),
        piped(url, "hello\n") as process,
    ):
        turn = await model.turn()
        connection = await proxy.next_connection()
        assert process.stdout is not None
        seen = b""
        for number in range(3):
            turn.say(f"before {number} ")
            async with asyncio.timeout(PATIENCE_S):
                while f"before {number} ".encode() not in seen:
                    seen += await process.stdout.read(65536)
            await connection.cut()
            turn.say(f"meanwhile {number} ")
            connection = await proxy.next_connection()
        turn.end("end")
        out, err = await output_of(process)
        text = seen.decode() + out
        expected = "".join(f"before {number} meanwhile {number} " for number in range(3))
        assert text == f"{expected}end\n"
        assert err.endswith(f"]\n{LOST}\n{LOST}\n{LOST}\n")
        assert process.returncode == 0
        assert model.calls == 1


async def test_what_was_said_into_a_dead_connection_is_answered_once() -> None:
    """The command is sent again after the reconnect."""
    model = Model()
    async with (
        running_server(model) as server,
        proxied(server) as (proxy, url),
        terminal(url) as screen,
    ):
        await proxy.blackhole()
        screen.type("hello\n")
        connection = await proxy.next_connection()
        await connection.reset()
        await proxy.resume()
        turn = await model.turn()
        turn.end("the answer")
        await screen.shows("the answer\n")
        assert turn.conversation == [("user", "hello")]
        assert model.calls == 1


async def test_what_was_said_is_not_told_again() -> None:
    """The server has it, and only its word on that was lost: it stands on the screen already."""
    model = Model()
    async with running_server(model) as server, proxied(server) as (proxy, url), terminal(url) as screen:
        connection = await proxy.next_connection()
        await connection.cut_after(1)
        screen.type("hello\n")
        await connection.closed()
        (await model.turn()).end("the answer")
        await screen.shows("the answer\n")
        assert "> hello" not in screen.screen
        assert model.calls == 1


async def test_a_restarted_server_has_lost_the_session() -> None:
    """The client says so and ends with status 1; it does not go on as if nothing had happened."""
    async with running_server(echo) as server, proxied(server) as (proxy, url), terminal(url) as screen:
        async with running_server(echo) as other:
            proxy.target = "127.0.0.1", other.port
            await proxy.reset()
            assert await screen.left() == 1
        await screen.shows("There is no such session, or it has expired.\n")
        assert "close code" not in screen.screen
        assert "Traceback" not in screen.screen


async def test_a_server_that_is_away_is_waited_for() -> None:
    """Refused and broken handshakes are no reason to give up, nor is an instance that is full."""
    model = Model()
    async with (
        running_server(model) as server,
        proxied(server) as (proxy, url),
        terminal(url) as screen,
    ):
        screen.type("hello\n")
        turn = await model.turn()
        turn.say("one ")
        await screen.shows("one ")
        await proxy.next_connection()
        with unused_port() as nobody:
            proxy.target = "127.0.0.1", nobody
            await proxy.reset()
            await proxy.next_connection()  # accepted, and reset: nobody is behind it
            await proxy.next_connection()
        proxy.target = "127.0.0.1", server.port
        turn.end("two")
        await screen.shows("two\n")
        assert "Traceback" not in screen.screen


async def test_ctrl_c_leaves_while_the_server_is_away() -> None:
    """There is nothing to stop, and nobody to tell."""
    async with running_server(echo) as server, proxied(server) as (proxy, url), terminal(url) as screen:
        with unused_port() as nobody:
            proxy.target = "127.0.0.1", nobody
            await proxy.reset()
            await screen.shows(LOST)
            screen.type("\x03")
            assert await screen.left() == 0


async def test_where_websockets_are_blocked_it_is_the_same() -> None:
    """Server-sent events do as well."""
    model = Model()
    async with (
        running_server(model) as server,
        without_websockets(server.port) as url,
        piped(url, "hello\n") as process,
    ):
        (await model.turn()).end("over events")
        out, err = await output_of(process)
        assert (out, process.returncode) == ("over events\n", 0)
        assert err.count("\n") == 1


# --- no server -------------------------------------------------------------------------------------------------------


@contextmanager
def unused_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else takes meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def fails_with_one_line(url: str, *arguments: str) -> str:
    async with piped(url, "hello\n", *arguments) as process:
        out, err = await output_of(process)
        assert process.returncode == 1
        assert out == ""
        assert err.count("\n") == 1, err
        return err


async def test_no_server() -> None:
    """One line, and status 1."""
    with unused_port() as port:
        assert "There is no server" in await fails_with_one_line(f"http://127.0.0.1:{port}")


async def test_no_server_for_a_session() -> None:
    """Also where a session was named: it never was attached to."""
    with unused_port() as port:
        await fails_with_one_line(f"http://127.0.0.1:{port}", "--session", "sess_1")


async def test_something_that_is_no_server() -> None:
    """It hangs up on the handshake: one line, and status 1."""

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        await fails_with_one_line(f"http://127.0.0.1:{port}")


async def test_no_address() -> None:
    """What is no URL is told as that."""
    for url in ("nonsense", "http://127.0.0.1:nope", "http://127.0.0.1:99999"):
        assert "no address" in await fails_with_one_line(url)
