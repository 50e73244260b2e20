"""Background tasks in the real `python -m realtime chat`."""

from __future__ import annotations

import asyncio

from tests.end_to_end import Model, echo
from tests.end_to_end.test_chat import PATIENCE_S, output_of, piped, terminal
from tests.support.server import running_server

LINE = '/task summarise {"text": "A long document."}\n'


async def test_a_pipe_waits_for_its_task() -> None:
    """It prints how that ended, and what it came to; the next line is said after that."""
    async with running_server(echo) as server, piped(server.url, LINE + "and now\n") as process:
        out, err = await output_of(process)
        assert out.index("chunks: 1\n") < out.index("and now\n")
        assert "[summarise complete]" in err
        assert process.returncode == 0


async def test_a_terminal_shows_a_task_and_cancels_it() -> None:
    """Its model call is closed, and the client goes on."""
    model = Model()
    async with running_server(model) as server, terminal(server.url) as screen:
        screen.type(LINE)
        turn = await model.turn()
        turn.say("one ")
        screen.type("/cancel\n")
        await screen.shows("[summarise cancelled]")
        async with asyncio.timeout(PATIENCE_S):
            await turn.closed.wait()
        screen.type(LINE)
        (await model.turn()).end("In short: nothing.")
        await screen.shows("[summarise 1/1 summarised part 1 of 1]")
        await screen.shows("[summarise complete]")
        await screen.shows("In short: nothing.")
