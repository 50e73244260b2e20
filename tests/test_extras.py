"""What an installation without the extras can do, and what it says of the rest.

The extras are installed here, so they are taken away: what `sys.modules` has as None can't be imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from realtime.extras import MODULES
from tests.support.instance import environment

ROOT = Path(__file__).resolve().parent.parent
REDIS_URL = "redis://127.0.0.1:1/0"
BLOCKED = [module for modules in MODULES.values() for module in modules] + ["hiredis", "croniter"]
BLOCKING = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))"
RUN = "from realtime.cli import main; main()"
STARTS = """
import asyncio, httpx, sys
from realtime.settings import Settings
from tests.support.server import running_server

async def start():
    async with running_server() as server, httpx.AsyncClient(trust_env=False, base_url=server.url) as http:
        page, script = await http.get("/"), await http.get("/static/demo.js")
        answer = await http.post("/v1/complete", json={"prompt": "Hello", "max_tokens": 2})
        print("got", page.status_code, script.status_code, answer.json()["text"])

asyncio.run(start())
"""
LIGHT = {"realtime.settings", "realtime.protocol", "realtime.errors"}
"""The least of the package, which shows that the modules below are those of this process."""
HEAVY = ("aiohttp", "anthropic", "cryptography", "httpx2", "jwt", "openai", "pydantic", "redis", "saq", "throttled")
"""What is imported when it is used, if it is: by a provider's client, a store, a token."""


def run(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a Python program comes to, in an environment of its own."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(variables), capture_output=True, text=True, timeout=60)


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh process has after a statement."""
    ran = run(f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))")
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout))


def test_server_runs_without_any_extra() -> None:
    """The page, its scripts and an answer, from memory."""
    ran = run(BLOCKING + STARTS)
    assert ran.returncode == 0, ran.stderr
    assert "got 200 200 This is" in ran.stdout


@pytest.mark.parametrize(
    ("extra", "setting", "variables"),
    [
        ("redis", "REALTIME_REDIS_URL", {"REALTIME_REDIS_URL": REDIS_URL}),
        ("openai", "OPENAI_API_KEY", {"OPENAI_API_KEY": "canary-1"}),
        ("otel", "REALTIME_TRACES", {"REALTIME_TRACES": "on"}),
        ("otel", "OTEL_EXPORTER_OTLP_ENDPOINT", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1/canary"}),
    ],
)
def test_setting_whose_extra_is_missing_stops_the_start(extra: str, setting: str, variables: dict[str, str]) -> None:
    """In one line that says what to do; and so says `realtime check`, with status 1."""
    started = run(f"{BLOCKING}\n{RUN}", "serve", "--port", "0", **variables)
    [line] = started.stderr.splitlines()
    assert started.returncode == 1
    assert setting in line
    assert line.endswith(f"pip install 'realtime-server[{extra}]'")
    checked = run(f"{BLOCKING}\n{RUN}", "check", **variables)
    assert checked.returncode == 1
    assert line.removeprefix("Error: ") in checked.stdout
    assert "canary" not in started.stderr + checked.stdout


def test_traces_that_cant_be_made_stop_whoever_would_make_them() -> None:
    """A worker of tasks, and a server of several processes, before any of them begins."""
    program = f"import sys; sys.modules.update(dict.fromkeys({MODULES['otel']!r}))\n{RUN}"
    for command in (["worker"], ["serve", "--port", "0", "--workers", "2"]):
        started = run(program, *command, REALTIME_TRACES="on", REALTIME_REDIS_URL=REDIS_URL)
        [line] = started.stderr.splitlines()
        assert started.returncode == 1
        assert line.endswith("pip install 'realtime-server[otel]'")


def test_extras_are_those_of_the_package() -> None:
    """What is looked for is what the extra brings: every name in pyproject.toml, and no module of another extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: [Requirement(one).name for one in asked] for name, asked in project["optional-dependencies"].items()
    }
    base = {Requirement(one).name for one in project["dependencies"]}
    for extra, modules in MODULES.items():
        packages = {re.sub("-py$", "", package) for package in extras[extra]}
        assert {module.replace(".", "-") for module in modules} <= packages
        assert not base & set(extras[extra])


@pytest.mark.parametrize("statement", ["import realtime", "import realtime.cli", "import realtime.app"])
def test_import_is_light(statement: str) -> None:
    """Nothing that takes long, or that may not be there."""
    modules = imported_by(statement)
    assert modules >= LIGHT
    assert [name for name in HEAVY if name in modules] == []
    assert statement.endswith("app") or not {"starlette", "uvicorn", "websockets"} & modules
