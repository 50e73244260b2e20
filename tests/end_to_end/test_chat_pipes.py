"""The real `python -m realtime chat` among other programs: what it writes where, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime.client import connect
from tests.end_to_end import PATIENCE_S, Model, Turn, echo
from tests.end_to_end.test_chat import ENVIRONMENT, ROOT, command, output_of, piped, proxied, started, terminal
from tests.support.server import running_server


@asynccontextmanager
async def open_ended(url: str, text: str, **options: Any) -> AsyncIterator[Process]:
    """The client in a pipe from which `text` has come, and more could. `options` are the process's."""
    process = await asyncio.create_subprocess_exec(
        *command(url), **{"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "cwd": ROOT, "env": ENVIRONMENT, **options}
    )
    async with started(process):
        if process.stdin is not None:
            process.stdin.write(text.encode())
            await process.stdin.drain()
        yield process


async def ended(process: Process) -> str:
    """What the process wrote to standard error until its end. Its input stays open: a script sleeps."""
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        err = await process.stderr.read()
        await process.wait()
    return err.decode()


async def stopped(turn: Turn) -> None:
    """Return once the model is let go of. Before the answer's own grace would end it."""
    async with asyncio.timeout(PATIENCE_S):
        await turn.closed.wait()


# --- whatever ends it, the model is stopped --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_the_answer(number: signal.Signals) -> None:
    """And is the status, without a word on it."""
    model = Model()
    async with running_server(model) as server, open_ended(server.url, "hello\n") as process:
        turn = await model.turn()
        process.send_signal(number)
        err = await ended(process)
        assert process.returncode == 128 + number
        assert err.count("\n") == 1, err
        await stopped(turn)


async def test_a_signal_stops_the_task() -> None:
    """That a script waits for."""
    model = Model()
    line = '/task summarise {"text": "A long document."}\n'
    async with running_server(model) as server, open_ended(server.url, line) as process:
        turn = await model.turn()
        process.send_signal(signal.SIGINT)
        await ended(process)
        await stopped(turn)


async def test_a_reader_that_has_seen_enough() -> None:
    """`| head -1`: it ends as other programs do, says nothing, and stops the answer."""
    model = Model()
    reader, writer = os.pipe()
    try:
        async with running_server(model) as server, open_ended(server.url, "hello\n", stdout=writer) as process:
            turn = await model.turn()
            turn.say("one ")
            assert await asyncio.to_thread(os.read, reader, 100) == b"one "
            os.close(reader)
            turn.say("two")
            err = await ended(process)
            assert process.returncode == 128 + signal.SIGPIPE
            assert err.count("\n") == 1, err
            await stopped(turn)
    finally:
        os.close(writer)


async def test_a_disk_that_is_full() -> None:
    """It is told as that, with status 1, and the answer is stopped."""
    model = Model()
    with open("/dev/full", "w") as full:
        async with running_server(model) as server, open_ended(server.url, "hello\n", stdout=full) as process:
            turn = await model.turn()
            turn.say("one ")
            err = await ended(process)
            assert err.splitlines()[1:] == ["The output can't be written: No space left on device"]
            assert process.returncode == 1
            await stopped(turn)


# --- what it can't use -----------------------------------------------------------------------------------------------


async def test_what_can_not_be_encoded_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is written."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    async with running_server(echo) as server, piped(server.url, "Héllo\n") as process:
        out, _ = await output_of(process)
        assert (out, process.returncode) == ("H?llo\n", 0)


def without(number: int) -> Callable[[], None]:
    """What closes a descriptor in the child, as service managers do."""
    return lambda: os.close(number)


async def test_a_closed_input_is_empty() -> None:
    """Nothing is asked."""
    async with running_server(echo) as server, open_ended(server.url, "", stdin=None, preexec_fn=without(0)) as process:
        err = await ended(process)
        assert process.returncode == 0
        assert "Traceback" not in err


@pytest.mark.parametrize("number", [1, 2])
async def test_a_closed_output_takes_all(number: int) -> None:
    """As if it were discarded."""
    model = Model()
    async with (
        running_server(model) as server,
        open_ended(server.url, "hello\n", preexec_fn=without(number)) as process,
    ):
        (await model.turn()).end("hi")
        assert process.stdin is not None
        process.stdin.write_eof()
        out, err = await output_of(process)
        assert process.returncode == 0
        assert out == ("hi\n" if number == 2 else "")
        assert "Traceback" not in err


# --- the status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["/task nope", "/help", "long" * 20_000])
async def test_a_refused_command_is_the_status(line: str) -> None:
    """If it is the last one; standard output has nothing of it."""
    async with running_server(echo) as server:
        async with piped(server.url, f"hello\n{line}\n") as process:
            out, err = await output_of(process)
            assert (out, process.returncode) == ("hello\n", 1)
            assert err.count("\n") == 2
        async with piped(server.url, f"{line}\nhello\n") as process:
            await output_of(process)
            assert process.returncode == 0


async def test_a_failed_answer_is_the_status() -> None:
    """The reason stands on standard error."""
    model = Model()
    async with running_server(model) as server, piped(server.url, "hello\n") as process:
        (await model.turn()).fail(RuntimeError("broken"))
        out, err = await output_of(process)
        assert (out, process.returncode) == ("", 1)
        assert err.count("\n") == 2


# --- others, and the lack of a server --------------------------------------------------------------------------------


async def test_what_others_say_is_shown() -> None:
    """Once; what was typed here stands on the screen already."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        session_id = screen.screen.split("session ")[1].split(";")[0]
        async with connect(server.url, session_id=session_id) as other:
            other.respond("from elsewhere")
            (await model.turn()).end("to elsewhere")
            await screen.shows("anonymous> from elsewhere\nto elsewhere\n")
        screen.type("from here\n")
        (await model.turn()).end("to here")
        await screen.shows("to here\n")
        assert "> from here" not in screen.screen


async def test_what_was_pasted_is_one_message() -> None:
    """It is asked once, with its lines."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        screen.type("one\ntwo\n\nthree\n")
        turn = await model.turn()
        turn.end("yes")
        await screen.shows("yes\n")
        assert turn.conversation == [("user", "one\ntwo\n\nthree")]
        assert model.calls == 1


async def test_what_was_typed_into_a_lost_session_is_told() -> None:
    """It is nowhere else."""
    async with running_server(echo) as server, proxied(server) as (proxy, url), terminal(url) as screen:
        async with running_server(echo) as other:
            await proxy.blackhole()
            screen.type("while away\n")
            connection = await proxy.next_connection()
            proxy.target = "127.0.0.1", other.port
            await connection.reset()
            await proxy.resume()
            assert await screen.left() == 1
        await screen.shows("[not delivered: while away]\n")
        await screen.shows("There is no such session")


async def test_another_server_at_the_address() -> None:
    """Its status is told, while it is tried again."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with open_ended(url, "hello\n") as process:
            assert process.stderr is not None
            async with asyncio.timeout(PATIENCE_S):
                assert await process.stderr.readline() == b"[no session yet, trying again: HTTP 501]\n"
