"""The JavaScript client as a package: its types are those of its code, and it can be installed and imported."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import realtime
from tests.support.event_sources import NODE_FOLDER, node_with_packages
from tests.support.markdown import blocks
from tests.support.programs import bound, program

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "static"
USAGE = Path(__file__).with_name("usage.ts")
TSC = NODE_FOLDER / "node_modules/.bin/tsc"
NPM = ("--offline", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
IMPORT = 'import("realtime-client").then((module) => console.log(Object.keys(module).sort().join()))'


async def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints, which has to succeed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *bound([str(word) for word in command]), cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    return out.decode()


async def test_the_types_are_those_of_the_code(tmp_path: Path) -> None:
    """The scripts agree with their types, and what is kept is what comes of them and of the protocol's structs."""
    await node_with_packages()
    await run(sys.executable, "scripts/update_types.py", tmp_path)
    written = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*.d.ts")}
    assert written == {str(file.relative_to(STATIC)): file.read_text() for file in STATIC.rglob("*.d.ts")}


async def test_the_page_agrees_with_its_types() -> None:
    """Every script of the demo, with the client's types."""
    await node_with_packages()
    options = "--allowJs --checkJs --strict --noEmit --target es2022 --lib es2024,dom,dom.iterable --module nodenext"
    await run(TSC, *options.split(), STATIC / "demo.js")


async def test_the_package_is_installed_and_imported(tmp_path: Path) -> None:
    """With all of its modules and types, in a folder where there is nothing else, by Node and by TypeScript."""
    await node_with_packages()
    npm, folder = program("npm"), tmp_path / "application"
    folder.mkdir()
    [packed] = json.loads(await run(npm, "pack", STATIC, "--json", "--pack-destination", tmp_path, *NPM))
    modules = {f"realtime/{file.name}" for file in STATIC.glob("realtime/*.*s")}
    expected = {"package.json", "README.md", "LICENSE", "realtime.js", "realtime.d.ts", *modules}
    assert {file["path"] for file in packed["files"]} == expected
    (folder / "package.json").write_text('{"type": "module"}')
    await run(npm, "install", tmp_path / packed["filename"], *NPM, cwd=folder)
    names = "MessageTooLarge,QueueFull,RealtimeError,RealtimeSession,ResponseStream,SessionClosed,TaskStream,newId"
    assert (await run(program("node"), "-e", IMPORT, cwd=folder)).strip() == names
    (folder / "usage.ts").write_text(USAGE.read_text())
    await run(TSC, "--strict", "--noEmit", "--module", "nodenext", "--target", "es2022", "usage.ts", cwd=folder)


def test_the_package_has_the_license_and_says_what_it_is() -> None:
    """The repository's license, and a text whose code is that of the documentation and which links to nothing."""
    assert (STATIC / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "](" not in (STATIC / "README.md").read_text()
    [program] = [block.text for block in blocks(STATIC / "README.md")]
    assert program in [block.text for block in blocks(ROOT / "docs/clients.md")]


def test_the_package_has_the_server_s_version() -> None:
    """They are released together."""
    package = json.loads((STATIC / "package.json").read_text())
    assert package["version"] == realtime.__version__
    assert "dependencies" not in package


async def test_the_python_client_is_light() -> None:
    """It brings in neither the server nor the SDK nor Redis, nor what only event streams need."""
    heavy = {"anthropic", "redis", "starlette", "uvicorn", "saq", "aiohttp", "httpx", "cryptography"}
    code = "import sys, realtime.client; print(*{name.split('.')[0] for name in sys.modules})"
    assert set((await run(sys.executable, "-c", code)).split()) & heavy == set()
