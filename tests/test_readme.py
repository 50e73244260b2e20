"""The README's examples are taken from the page and run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import connect

from realtime.settings import Settings, load_settings, variable
from realtime.tasks.builtin import BUILTIN_TASKS
from realtime.tasks.registry import Registry
from tests.support.examples import output_of
from tests.support.instance import environment as clean
from tests.support.server import running_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PATIENCE_S = 20.0


def blocks(language: str) -> list[str]:
    """The README's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


CLIENT, RESPONDER, SERVER, TASK = blocks("python")


@pytest.fixture
def shout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the example lies as `shout.py`, where it can be imported."""
    assert "`shout.py`" in README
    (tmp_path / "shout.py").write_text(RESPONDER)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("shout", None)


@pytest.fixture
def errands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What `REALTIME_TASKS` has to be for the example, which can be imported."""
    assert "`errands.py`" in README
    (tmp_path / "errands.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    found = re.search(r"^    REALTIME_TASKS=(\w+) \.venv/bin/realtime serve$", README, re.MULTILINE)
    assert found
    yield found[1]
    sys.modules.pop("errands", None)


@asynccontextmanager
async def serving(server: uvicorn.Server, **options: Any) -> AsyncIterator[int]:
    """Run a uvicorn server in this loop; the port that it listens on."""
    task = asyncio.create_task(server.serve(**options))
    try:
        while not server.started:
            await asyncio.sleep(0)
            if task.done():
                task.result()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def answer_of(url: str) -> str:
    """Connect, and send what the README says; the answer that comes."""
    text = ""
    async with asyncio.timeout(PATIENCE_S), connect(url, proxy=None) as socket:
        await socket.send(websocket_message())
        while (event := json.loads(await socket.recv()))["type"] != "response.done":
            text += event.get("delta", "")
    assert event["status"] == "completed", event
    return text


def websocket_message() -> str:
    """What the README says to send over a bare WebSocket."""
    found = re.search(r"send\s`(\{.*?\})`", README)
    assert found
    return found[1]


def uvicorn_options() -> tuple[str, dict[str, str]]:
    """The application and the options of the README's uvicorn command."""
    found = re.search(r"^    \.venv/bin/uvicorn (.*)$", README, re.MULTILINE)
    assert found
    app, *options = shlex.split(found[1])
    names = (name.removeprefix("--").replace("-", "_") for name in options[::2])
    return app, dict(zip(names, options[1::2], strict=True))


async def test_the_responder_answers_under_uvicorn(shout: Path) -> None:
    """The example, served as the README says, answers over a WebSocket."""
    app, options = uvicorn_options()
    config = uvicorn.Config(app, port=0, log_config=None, **options)  # type: ignore[arg-type]
    async with serving(uvicorn.Server(config)) as port:
        assert await answer_of(f"ws://127.0.0.1:{port}/v1/realtime") == "HELLO "


async def test_the_responder_answers_under_its_own_server(shout: Path) -> None:
    """The example that runs the server itself does, as a process of its own, and ends when it is asked to."""
    environment = {**os.environ, "REALTIME_PORT": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{shout}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        url = (await process.stderr.readline()).decode().split()[-1]
        assert await answer_of(url.replace("http", "ws") + "/v1/realtime") == "HELLO "
    finally:
        process.terminate()
        await process.communicate()
    assert process.returncode == 0


def access_environment(secret: str) -> dict[str, str]:
    """What the README has the server run with, where `openssl` makes that secret."""
    export, serve = re.findall(
        r"^    (.*REALTIME_AUTH_SECRET=.*)\n    (.*) \.venv/bin/realtime serve$", README, re.MULTILINE
    )[0]
    assert export == "export REALTIME_AUTH_SECRET=$(openssl rand -hex 32)"
    pairs = (word.partition("=") for word in shlex.split(serve))
    return {"REALTIME_AUTH_SECRET": secret, **{name: value for name, _, value in pairs}}


async def test_a_user_with_a_token_is_answered_at_a_known_cost() -> None:
    """The token that the README's command prints is good for the call below it, and without it there is no answer."""
    [block] = [block for block in blocks("sh") if block.startswith("TOKEN=")]
    make, call = re.fullmatch(r"TOKEN=\$\(\.venv/bin/realtime (.*)\)\n(curl .*)\n", block).groups()  # type: ignore[union-attr]
    environment = access_environment(secrets.token_hex(32))
    command = [sys.executable, "-m", "realtime", *shlex.split(make)]
    made = await asyncio.create_subprocess_exec(*command, env=clean(environment), stdout=asyncio.subprocess.PIPE)
    token = (await made.communicate())[0].decode().strip()
    asked = curl(call.replace("$TOKEN", token))
    settings = load_settings(environment)
    given = {field: getattr(settings, field) for field in settings.__struct_fields__ if variable(field) in environment}
    async with (
        running_server(hello, **given) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        assert (await client.post(asked.path, content=asked.body)).status_code == 401
        answer = await client.post(asked.path, headers=asked.headers, content=asked.body)
    assert answer.json()["text"] == "You said: Hello."
    assert answer.json()["usage"]["cost_usd"] > 0
    assert '"tokens";q=200000' in answer.headers["ratelimit-policy"]
    assert (Settings().rate_responses, "ten responses a minute" in README) == ("10/minute", True)


def test_the_responder_is_short() -> None:
    """It is about ten lines, as such an example has to be."""
    assert len([line for line in RESPONDER.splitlines() if line.strip()]) <= 10


class Curl(NamedTuple):
    """What a curl command asks for."""

    method: str
    path: str
    headers: dict[str, str]
    body: str | None


def curl(command: str) -> Curl:
    """A command, taken apart."""
    words = iter(shlex.split(command)[1:])
    method, url, headers, body = "", "", {}, None
    for word in words:
        match word:
            case "-N" | "-s":
                pass
            case "-X":
                method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case "-d":
                body = next(words)
            case _:
                url = word
    assert urlsplit(url).netloc == "127.0.0.1:8000"
    return Curl(method or ("GET" if body is None else "POST"), urlsplit(url).path, headers, body)


async def hello(request: Any) -> AsyncIterator[str]:
    """A responder that is done soon."""
    yield f"You said: {request.messages[-1].content}."


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/complete"])
async def test_the_curl_command_is_answered(path: str) -> None:
    """What it sends is answered in pieces and with an end; `/v1/complete` takes the same."""
    [command] = [block for block in blocks("sh") if block.startswith("curl ")]
    asked = curl(command)
    assert (asked.method, asked.path) == ("POST", "/v1/stream")
    async with running_server(hello) as server, httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(server.url + path, headers=asked.headers, content=asked.body)
    assert answer.status_code == 200
    if path == "/v1/complete":
        assert answer.json()["text"] == "You said: Hello."
    else:
        assert answer.text.startswith('data: {"text":"You said: Hello."}\n\nevent: done\n')
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_the_commands_of_a_session_do_what_they_say() -> None:
    """The three of them, one after the other: a session, a command, and the stream of what came of it."""
    [block] = [block for block in blocks("sh") if block.startswith("SESSION=")]
    pattern = re.search(r"grep -o '(.*?)'", block)
    assert pattern
    make, ask, follow = re.findall(r"curl .*?(?= \||\n)", block)
    async with running_server(hello) as server, httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        made = await client.request(curl(make).method, curl(make).path)
        [session_id] = set(re.findall(pattern[1], made.text))
        asked, followed = (curl(command.replace("$SESSION", session_id)) for command in (ask, follow))
        assert (await client.request(asked.method, asked.path, content=asked.body)).status_code == 202
        async with asyncio.timeout(PATIENCE_S), client.stream(followed.method, followed.path) as stream:
            seen = [line async for line in until_done(stream.aiter_lines())]
    assert any('"delta":"You said: Hello."' in line for line in seen)


async def until_done(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The lines of a stream up to the end of its first response."""
    async for line in lines:
        yield line
        if line == "event: response.done":
            return


async def test_the_task_is_run_as_the_commands_say(errands: str) -> None:
    """Both of them, one after the other: the task is made, and its events come, up to its end."""
    [block] = [block for block in blocks("sh") if block.startswith("TASK=")]
    pattern = re.search(r"grep -o '(.*?)'", block)
    assert pattern
    make, follow = re.findall(r"curl .*?(?= \||\n)", block)
    async with (
        running_server(hello, tasks=(errands,)) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False) as client,
    ):
        asked = curl(make)
        made = await client.request(asked.method, asked.path, content=asked.body)
        assert made.status_code == 202
        [task_id] = set(re.findall(pattern[1], made.text))
        async with asyncio.timeout(PATIENCE_S):
            followed = await client.get(curl(follow.replace("$TASK", task_id)).path)
        events = [json.loads(line[6:]) for line in followed.text.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "task.started"
    assert [event["message"] for event in events if event["type"] == "task.progress"][-1] == "wrote to Alan"
    assert events[-1]["result"] == [f"You said: Write a short letter to {name}.." for name in ("Ada", "Alan")]


async def test_the_task_is_run_for_a_session(errands: str) -> None:
    """The message that the README says to send over its WebSocket."""
    [message] = re.findall(r'`(\{"type": "task.create".*?\})` over its WebSocket', README)
    async with running_server(hello, tasks=(errands,)) as server, asyncio.timeout(PATIENCE_S):
        async with connect(server.ws_url, proxy=None) as socket:
            await socket.send(message)
            while (event := json.loads(await socket.recv()))["type"] != "task.done":
                pass
    assert (event["status"], len(event["result"])) == ("complete", 1)


def test_the_task_is_short() -> None:
    """The function is about ten lines, as such an example has to be; `offload` and the built-in ones are named."""
    assert len([line for line in TASK.splitlines() if line.strip()]) <= 13
    assert "from realtime import offload" in README
    for name in Registry(BUILTIN_TASKS).definitions:
        assert f"`{name}`" in README


async def test_the_demo_answers_what_the_readme_sends() -> None:
    """The bare WebSocket's message is answered by the server as it is."""
    async with running_server(hello) as server:
        assert await answer_of(server.ws_url) == "You said: Hello."


async def test_the_clients_are_answered() -> None:
    """The JavaScript example, as a page of the server would run it, and the Python one."""
    [script] = blocks("js")
    async with running_server(hello) as server:
        assert await output_of(script, server) == "You said: Hello.\n"
        told = await output_of(CLIENT, server)
    assert "ResponseCreated(" in told
    assert "delta='You said: Hello.'" in told
