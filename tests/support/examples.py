"""Runs the examples of the pages as they are, against a server that is somewhere else than they say."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.support.instance import environment
from tests.support.programs import bound, program
from tests.support.server import RunningServer

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0


async def output_of(example: str, server: RunningServer) -> str:
    """What a Python program, or a JavaScript module, prints. Its import of the client is that of this repository."""
    code = example.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    if "import {" not in example:
        return await _output([sys.executable, "-c", code])
    client = (ROOT / "static/realtime.js").as_uri()
    for name in ("/static/realtime.js", "realtime-client"):
        code = code.replace(f'from "{name}"', f'from "{client}"')
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "example.mjs")
        script.write_text(code)
        return await _output([program("node"), "--experimental-websocket", "--no-warnings", str(script)])


async def _output(command: list[str]) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *bound(command), stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment({})
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b""), err.decode()
    return out.decode()
