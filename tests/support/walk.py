"""Does what a page says, block by block, as a reader would: with one folder, one shell, and one server at a time.

async with walk(page) as walking:
    await walking.to_the_end()

The language of a block says how it is checked:

- `sh` is run. What it starts that runs until it is stopped is started here: `realtime serve` in this process.
- `python` with a title is a file; what is never started is imported in the end. Without a title it is run; a server
  that it runs goes on.
- `js` with a title is a file. Without one it is run by Node, with the client of this repository. `html` is a file.
- `text` is what the block before has printed; `…` stands for anything. A drawing is not checked.
- `json` is a message that the server or a client may send, or at least JSON. `yaml` and `http` are of that form.
- `nginx` is a part of the configuration that is shipped, and nginx takes it. `redis` are commands, and Redis does them.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import yaml  # type: ignore[import-untyped]
from uvicorn.main import main as uvicorn_command

from realtime.cli import main as realtime_command
from realtime.responders.base import Request
from realtime.responders.choose import choose
from realtime.settings import load_settings, variable
from scripts.schemas import CLIENT, SERVER
from tests.support.instance import ROOT, environment, process
from tests.support.markdown import Block, blocks
from tests.support.model_server import ModelServer
from tests.support.nginx import command, configuration, nginx
from tests.support.ports import free_port
from tests.support.programs import bound, program
from tests.support.redis_server import RedisServer, redis_server
from tests.support.server import running_server
from tests.support.shell import Shell, Started

PATIENCE_S = 60.0
ADDRESS = re.compile(r"(?<=127\.0\.0\.1:)8000\b")
REDIS = re.compile(r"redis://127\.0\.0\.1(:6379/0)?(?=\s|$)")
DRAWN = re.compile(r"[─│┌└▶▼]")


async def answer(request: Request) -> AsyncIterator[str]:
    """Answers in place of a model."""
    yield f"You said: {request.messages[-1].content}."


class Walk:
    """A reader, on the way through a page. `port` is where the page's server listens, 0 without one; `printed` is what
    each block has printed that was run."""

    def __init__(self, page: Path, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.port = 0
        self._blocks = blocks(page)
        self._shell = Shell(folder)
        self._stack = stack
        self._serving = AsyncExitStack()
        self._redis: RedisServer | None = None
        self.printed: list[str] = []
        self._files: dict[str, Block] = {}
        self._ports: dict[str, int] = {}
        (folder / "nginx").symlink_to(ROOT / "nginx")

    async def to(self, title: str) -> None:
        """Go on up to and with the file of that name."""
        for block in self._blocks:
            await self.take(block)
            if block.title == title:
                return
        raise LookupError(title)

    async def step(self) -> None:
        """Take the next block."""
        await self.take(next(self._blocks))

    async def to_the_end(self) -> None:
        """Go on to the end of the page, and see that no file was left that can't be imported."""
        for block in self._blocks:
            await self.take(block)
        for name in list(self._files):
            importlib.import_module(name.removesuffix(".py").replace("/", "."))
        await self._serving.aclose()

    async def take(self, block: Block) -> None:
        """Check one block. Whatever is raised names it."""
        check: Callable[[Block], Any] | None = getattr(self, f"_take_{block.language}", None)
        assert check is not None, f"{block.place}: nothing checks a block of {block.language!r}"
        try:
            async with asyncio.timeout(PATIENCE_S):
                done = check(block._replace(text=await self._here(block.text)))
                if inspect.isawaitable(done):
                    await done
        except Exception as error:
            error.add_note(f"in the block at {block.place}")
            raise

    async def _here(self, text: str) -> str:
        """A block's text with what is in another place here."""
        if REDIS.search(text):
            text = REDIS.sub((await self._its_redis()).url, text)
        if ADDRESS.search(text) and not self.port:
            await self._serve({})  # the page takes it for granted
        return ADDRESS.sub(str(self.port), text).replace(".venv/bin/", "")

    @property
    def _its(self) -> dict[str, str]:
        """With that a program finds the page's modules, and the package."""
        return {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}

    async def _its_redis(self) -> RedisServer:
        if self._redis is None:
            self._redis = await self._stack.enter_async_context(redis_server())
        return self._redis

    # ------------------------------------------------------------------------------------------------- what is run

    async def _take_sh(self, block: Block) -> None:
        printed, started = await self._shell.run(block.text, self.port)
        self.printed.append(printed)
        for one in started:
            start = getattr(self, f"_start_{Path(one.words[0]).name}")
            await start(one)

    async def _start_realtime(self, one: Started) -> None:
        name, *options = one.words[1:]
        subcommand = realtime_command.commands[name]
        subcommand.make_context(name, options)
        if name == "serve":
            await self._serve(one.variables)
        else:
            await self._work(one.variables)

    async def _work(self, variables: dict[str, str]) -> None:
        model = await self._stack.enter_async_context(ModelServer())
        its = {**_settings_in(variables), "ANTHROPIC_BASE_URL": model.url, **self._its}
        command = (sys.executable, "-m", "realtime", "worker")
        worker = await self._stack.enter_async_context(process(command, its))
        await worker.logged("worker started")

    async def _serve(self, variables: dict[str, str]) -> None:
        """Serve as the settings say, with somebody else in the place of the model that they name."""
        settings = load_settings(variables)
        choose(settings, variables)
        given = {
            field: getattr(settings, field) for field in settings.__struct_fields__ if variable(field) in variables
        }
        await self._serving.aclose()
        server = await self._serving.enter_async_context(running_server(answer, **{**given, "port": 0}))
        self.port = server.port

    async def _start_make(self, one: Started) -> None:
        target = one.words[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        if target == "serve":
            _, _, options = (one.words[2:] or [""])[0].partition("=")
            await self._start_realtime(Started(["realtime", "serve", *shlex.split(options)], one.variables))

    async def _start_uvicorn(self, one: Started) -> None:
        context = uvicorn_command.make_context("uvicorn", one.words[1:])
        app, ws = context.params["app"], context.params["ws"]
        await self._serving.aclose()
        self._serving.enter_context(_anew(app.partition(":")[0]))
        server = uvicorn.Server(uvicorn.Config(app, port=0, ws=ws, lifespan="on", log_config=None))
        self.port = await self._serving.enter_async_context(_under_uvicorn(server))

    async def _start_python(self, one: Started) -> None:
        """A program of the page, or a module, which says that it is up."""
        module = one.words[-1].removesuffix(".py")
        await self._run(module, one.variables)

    async def _run(self, module: str, variables: dict[str, str]) -> None:
        """Run a module that serves. One with a port of its own leaves the others alone."""
        given = _settings_in(variables)
        port = given.pop("REALTIME_PORT", "")
        if not port:
            await self._serving.aclose()
        model = await self._serving.enter_async_context(ModelServer())
        its = {**given, "REALTIME_PORT": str(free_port()), "ANTHROPIC_BASE_URL": model.url, **self._its}
        up = await self._serving.enter_async_context(process((sys.executable, "-m", module), its))
        await up.up()
        self.port = self._ports[port] = up.port

    async def _start_nginx(self, one: Started) -> None:
        """In front of the instances that the page has started with ports of their own."""
        changed = (self.folder / "visit.conf").read_text()
        assert [port for port in self._ports if f"127.0.0.1:{port} " not in changed and port] == []
        proxy = await self._serving.enter_async_context(nginx(*(up for port, up in self._ports.items() if port)))
        self.port = proxy.port

    async def _start_docker(self, one: Started) -> None:
        assert one.words[1:3] == ["compose", "up"], one.words

    async def _start_pip(self, one: Started) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for wanted in one.words[2:]:
            name, _, extras = wanted.rstrip("]").partition("[")
            assert name == project["name"], wanted
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"]), wanted

    async def _start_npm(self, one: Started) -> None:
        if one.words[1] == "pack":
            assert (ROOT / one.words[2] / "package.json").exists()

    async def _start_upstream(self, one: Started) -> None:
        assert (ROOT / one.words[0].replace("/build/", "/")).with_suffix(".c").exists()

    _start_load = _start_upstream

    async def _take_python(self, block: Block) -> None:
        if block.title:
            _write(self.folder, block)
            self._files[block.title] = block
        elif re.search(r"^run\(", block.text, re.MULTILINE):
            _write(self.folder, block._replace(title="block.py"))
            await self._run("block", {})
        else:
            await self._print([sys.executable, "-c", block.text])

    async def _take_js(self, block: Block) -> None:
        if block.title:
            _write(self.folder, block)
            return
        client = (ROOT / "static/realtime.js").as_uri()
        script = re.sub(r'from "(?:/static/realtime.js|realtime-client)"', f'from "{client}"', block.text)
        options = ("--experimental-websocket", "--no-warnings", "--input-type=module", "--eval")
        await self._print([program("node"), *options, script])

    async def _print(self, command: list[str]) -> None:
        """Run a program that ends by itself, and has something to say."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *bound(command), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment(self._its)
        )
        out, err = await process.communicate()
        assert (process.returncode, err) == (0, b""), f"it ended with {process.returncode}: {err.decode()}"
        assert out, "it says nothing"
        self.printed.append(out.decode())

    def _take_html(self, block: Block) -> None:
        _write(self.folder, block)

    # --------------------------------------------------------------------------------------------- what is compared

    def _take_text(self, block: Block) -> None:
        if not DRAWN.search(block.text):
            pattern = ".*".join(re.escape(line).replace("…", ".*") for line in block.text.splitlines())
            assert re.search(pattern, self.printed[-1], re.DOTALL), f"{block.text}\nis not in\n{self.printed[-1]}"

    def _take_json(self, block: Block) -> None:
        for text in [block.text] if block.text.startswith("{\n") else block.text.splitlines():
            message = msgspec.json.decode(text)
            if isinstance(message, dict) and "type" in message:
                _convert(message)

    def _take_yaml(self, block: Block) -> None:
        assert yaml.safe_load(block.text)

    def _take_http(self, block: Block) -> None:
        assert all(re.match(r"[A-Za-z-]+: \S", line) for line in block.text.splitlines())

    async def _take_redis(self, block: Block) -> None:
        redis = await self._its_redis()
        for line in block.text.splitlines():
            assert await redis.command(*shlex.split(line)) in {"OK", b"OK"}

    def _take_nginx(self, block: Block) -> None:
        """The first location comes after it."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shipped, first = configuration(folder, 8080, [8001]), re.compile(r"^(?= *location )", re.MULTILINE)
        (folder / "nginx.conf").write_text(first.sub(lambda _: block.text, shipped, count=1))
        check = subprocess.run([*command(folder), "-t"], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stderr


def _write(folder: Path, block: Block) -> None:
    """Write a file of a page. One that is in the repository has to be what stands there, below what says what it is."""
    if (ROOT / block.title).exists():
        assert (ROOT / block.title).read_text().endswith(block.text), f"{block.title} says something else"
    file = folder / block.title
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


def _settings_in(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(("REALTIME_", "ANTHROPIC_", "OPENAI_"))}


def _convert(message: dict[str, Any]) -> None:
    """Hold a message against its struct, whoever sends it."""
    kinds = [kinds[message["type"]] for kinds in (CLIENT, SERVER) if message["type"] in kinds]
    assert kinds, f"there is no {message['type']!r}"
    errors = []
    for kind in kinds:
        unknown = set(message) - {"type"} - set(msgspec.structs.fields(kind) and kind.__struct_encode_fields__)
        try:
            assert not unknown, unknown
            msgspec.convert(message, kind)
            return
        except (msgspec.ValidationError, AssertionError) as error:
            errors.append(error)
    raise ExceptionGroup(f"{message} is not of that form", errors)


@asynccontextmanager
async def _under_uvicorn(server: uvicorn.Server) -> AsyncIterator[int]:
    """Run a uvicorn server in this loop; the port that it listens on."""
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0)
            if serving.done():
                serving.result()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


@contextmanager
def _anew(module: str) -> Iterator[None]:
    """A module is loaded anew, here and by whoever loads it afterwards: an application starts once."""
    sys.modules.pop(module, None)
    yield
    sys.modules.pop(module, None)
    package, _, name = module.rpartition(".")
    if package:
        vars(sys.modules[package]).pop(name, None)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith(str(folder)):
                del sys.modules[name]


@asynccontextmanager
async def walk(page: Path) -> AsyncIterator[Walk]:
    """A walk through a page, which leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="page-") as name, _importable(Path(name)):
        async with AsyncExitStack() as stack:
            walking = Walk(page, Path(name), stack)
            stack.push_async_callback(walking._serving.aclose)
            yield walking
