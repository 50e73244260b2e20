"""The processes that docker-compose.yml describes, started as it says, but on free ports of this machine."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx

from realtime.access.tokens import sign
from realtime.settings import Settings
from tests.end_to_end import PATIENCE_S
from tests.support.client import attached
from tests.support.deployment import (
    INSTANCES,
    environment_of,
    image_environment,
    image_health_check,
    services,
    words,
)
from tests.support.instance import START_S, Instance, process
from tests.support.model_server import ModelServer
from tests.support.nginx import Nginx, nginx
from tests.support.ports import free_port
from tests.support.programs import program
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scenarios import Gate, Scenario, Stop, Text

SERVICES = services()


@dataclass
class Stack:
    """What `docker compose up` would start, and a model."""

    model: ModelServer
    redis: RedisServer
    instances: list[Instance]
    worker: Instance
    nginx: Nginx


@asynccontextmanager
async def running_stack(*scenario: Text | Gate | Stop, **shell: str) -> AsyncIterator[Stack]:
    """All of it, up, in the order of its dependencies. `shell` are variables that are passed on, as they are set."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(ModelServer(default=Scenario(scenario)))
        redis = await stack.enter_async_context(running_redis())
        starting = [running_instance(name, redis, model, **shell) for name in INSTANCES]
        contexts = [running_worker(redis, model, **shell), *starting]
        worker, *instances = await asyncio.gather(*map(stack.enter_async_context, contexts))
        ports = [one.port for one in instances]
        name, *options = SERVICES["nginx"]["entrypoint"]
        assert name == "nginx"
        proxy = await stack.enter_async_context(nginx(*ports, options=options))
        yield Stack(model, redis, instances, worker, proxy)


@asynccontextmanager
async def running_redis() -> AsyncIterator[RedisServer]:
    """Redis with the options of its service."""
    name, *flags = SERVICES["redis"]["command"]
    assert name == "redis-server"
    names, values = flags[::2], flags[1::2]
    options = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(names, values, strict=True)}
    async with redis_server(**options) as redis:
        yield redis


@asynccontextmanager
async def running_instance(name: str, redis: RedisServer, model: ModelServer, **shell: str) -> AsyncIterator[Instance]:
    """An instance with the command and the environment of its service, but for addresses."""
    async with running_service(name, redis, model, **shell) as one:
        await one.up()
        yield one


@asynccontextmanager
async def running_worker(redis: RedisServer, model: ModelServer, **shell: str) -> AsyncIterator[Instance]:
    """The worker, likewise."""
    async with running_service("worker", redis, model, **shell) as one:
        async with asyncio.timeout(START_S):
            await one.logged("worker started")
        yield one


@asynccontextmanager
async def running_service(name: str, redis: RedisServer, model: ModelServer, **shell: str) -> AsyncIterator[Instance]:
    """The process of a service that is made of the image; it may not be up yet."""
    assert shell.keys() <= SERVICES[name]["environment"].keys()
    here = {"redis:6379": f"127.0.0.1:{redis.port}"}
    variables = {
        **image_environment(),
        **{key: replaced(value, here) for key, value in environment_of(SERVICES[name]).items()},
        "REALTIME_HOST": "127.0.0.1",
        "REALTIME_PORT": str(free_port()),
        "ANTHROPIC_API_KEY": "test",
        "ANTHROPIC_BASE_URL": model.url,
        **shell,
    }
    assert words("ENTRYPOINT") == ["realtime"]
    async with process([sys.executable, "-m", "realtime", *SERVICES[name]["command"]], variables) as one:
        yield one


def replaced(text: str, changes: dict[str, str]) -> str:
    """`text` with what is to be changed changed."""
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


async def status_of(command: Sequence[str], **variables: str) -> int:
    """The status of a program that runs by itself."""
    result = await asyncio.to_thread(
        subprocess.run, command, env={**os.environ, **variables}, capture_output=True, timeout=30, check=False
    )
    return result.returncode


# ------------------------------------------------------------------------------------------------- each by itself


async def test_redis_takes_its_options() -> None:
    """And means by them what the file says."""
    async with running_redis() as redis:
        expected = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
        for name, value in expected.items():
            assert await redis.command("CONFIG", "GET", name) == {name: value}
        assert (await redis.command("CONFIG", "GET", "maxmemory"))["maxmemory"] == str(512 * 2**20)


async def test_redis_outlives_a_kill_with_its_data() -> None:
    """What was acknowledged a moment before is still there."""
    async with running_redis() as redis:
        await redis.command("SET", "key", "value")
        await redis.kill()
        await redis.start()
        assert await redis.command("GET", "key") == "value"


async def test_the_health_check_of_redis_tells_whether_it_is_up() -> None:
    """With the program that its image has."""
    kind, script = SERVICES["redis"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    async with running_redis() as redis:
        command = ["sh", "-c", script.replace("redis-cli", f"redis-cli -p {redis.port}")]
        assert await status_of(command) == 0
        await redis.kill()
        assert await status_of(command) != 0


async def test_the_health_check_of_an_instance_tells_whether_it_is_up() -> None:
    """With the image's Python, and whatever proxies are set."""
    port = str(free_port())
    name, *rest = image_health_check()
    assert name == "python"
    check = [sys.executable, *rest]
    variables = {"REALTIME_PORT": port, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    async with process([sys.executable, "-m", "realtime", "serve"], {"REALTIME_PORT": port}) as one:
        await one.up()
        assert await status_of(check, **variables) == 0
    assert await status_of(check, **variables) != 0


async def test_the_health_check_of_nginx_tells_whether_an_instance_is_there() -> None:
    """Through it, as a client would."""
    kind, *command = SERVICES["nginx"]["healthcheck"]["test"]
    assert kind == "CMD"
    program(command[0])  # the image of nginx has it
    port = free_port()
    async with nginx(port) as proxy:
        check = shlex.split(shlex.join(command).replace("127.0.0.1:8080", f"127.0.0.1:{proxy.port}"))
        assert await status_of(check) != 0
        async with process([sys.executable, "-m", "realtime", "serve"], {"REALTIME_PORT": str(port)}) as one:
            await one.up()
            async with asyncio.timeout(PATIENCE_S):  # for 2 s nginx leaves alone an instance that was not there
                while await status_of(check) != 0:  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(0.1)


# ------------------------------------------------------------------------------------------------------- together


async def test_it_streams_an_answer() -> None:
    """Through nginx, from the model, token by token; the session is in Redis, and not for ever."""
    gate = Gate()
    async with running_stack(Text("one "), gate, Text("two"), Stop()) as stack:
        async with asyncio.timeout(PATIENCE_S), attached(stack.nginx) as client:
            response_id = await client.respond()
            assert (await client.until("response.output_text.delta"))["delta"] == "one "
            gate.open()
            assert (await client.until("response.done"))["status"] == "completed"
            assert client.transcript.texts[response_id] == "one two"
        keys = await stack.redis.command("KEYS", "*")
        assert keys
        assert [key for key in keys if await stack.redis.command("PTTL", key) < 0] == []


async def test_a_task_goes_all_the_way() -> None:
    """A viewer asks for it through nginx, the worker does it, and the viewer sees it begin while the model still holds
    it up; over HTTP it is told as the viewer has seen it."""
    gate = Gate()
    async with running_stack(gate, Text("In short: all is well."), Stop()) as stack:
        async with asyncio.timeout(PATIENCE_S), attached(stack.nginx) as client:
            await client.send("task.create", task_id="mine", name="summarise", input={"text": "A long document."})
            assert (await client.until("task.started"))["attempt"] == 1
            gate.open()
            assert (await client.until("task.progress"))["progress"] == 1
            done = await client.until("task.done")
            assert (done["status"], done["result"]["summary"]) == ("complete", "In short: all is well.")
            async with httpx.AsyncClient(base_url=stack.nginx.url, trust_env=False) as http:
                shown = (await http.get(f"/v1/sessions/{client.session_id}/tasks/mine")).json()
            assert (shown["status"], shown["attempt"], shown["result"]) == ("complete", 1, done["result"])


async def test_with_a_secret_who_comes_needs_a_token() -> None:
    """Without one nobody gets past nginx and the instances; with one an answer is paid from its user's budget."""
    settings = Settings(auth_secret="a secret for tokens, of at least 32 bytes")
    shell = {"REALTIME_AUTH_SECRET": settings.auth_secret, "REALTIME_TOKEN_BUDGET": "200000/day"}
    async with running_stack(Text("one"), Stop(), **shell) as stack, asyncio.timeout(PATIENCE_S):
        async with httpx.AsyncClient(base_url=stack.nginx.url, trust_env=False, timeout=PATIENCE_S) as http:
            assert (await http.post("/v1/complete", json={"prompt": "Hello"})).status_code == 401
            headers = {"Authorization": f"Bearer {sign(settings, user='anna', ttl_s=3600)}"}
            answer = await http.post("/v1/complete", json={"prompt": "Hello"}, headers=headers)
    assert answer.json()["text"] == "one"
    assert '"oneshots";q=30, "tokens";q=200000' in answer.headers["ratelimit-policy"]


async def test_it_ends_in_order() -> None:
    """As `docker compose down` ends it: nginx first, then the instances and the worker, then Redis, each by its
    signal."""
    async with running_stack(Text("one"), Stop()) as stack:
        async with attached(stack.nginx) as client:
            assert await client.answer() == "one"
        assert await stack.nginx.quit() == 0
        servers = [*stack.instances, stack.worker]
        for one in servers:
            one.terminate()
        async with asyncio.timeout(30):
            assert [await one.exit_status() for one in servers] == [0, 0, 0]
        await stack.redis.terminate()


async def test_it_survives_the_loss_of_an_instance() -> None:
    """A container that is killed: its clients come back to the other one, with their session."""
    async with running_stack(Text("one"), Stop()) as stack:
        async with attached(stack.nginx) as client:
            transcript, session_id = client.transcript, client.session_id
            assert await client.answer() == "one"
            stack.instances[0].kill()
            assert await stack.instances[0].exit_status() == -signal.SIGKILL
        for _ in range(2):
            query = {"after": transcript.after()}
            async with asyncio.timeout(PATIENCE_S):
                async with attached(stack.nginx, session_id, transcript=transcript, **query) as back:
                    assert await back.answer() == "one"
