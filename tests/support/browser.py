"""One real Chromium for a module of tests; each test has windows of its own in it, which may show no error.

Import `chromium`, `browser`, `open_context` and `context` as fixtures, and `needs_chromium` as `pytestmark`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, async_playwright

from tests.support.programs import bound

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--log-level=3",
]
DESKTOP = {"width": 1360, "height": 850}
REPORT_POLICY = """addEventListener("securitypolicyviolation", ({violatedDirective, blockedURI}) =>
    console.error("policy", violatedDirective, blockedURI))"""

# On a laptop without it the tests are skipped; in CI they fail.
needs_chromium = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="chromium is missing")

OpenContext = Callable[..., Awaitable[BrowserContext]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """Where the browser of the module is told what to do."""
    assert CHROMIUM is not None, "chromium is missing"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = bound([CHROMIUM, *ARGUMENTS, "--remote-debugging-port=0", f"--user-data-dir={profile}"])
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            found = (re.search(r"DevTools listening on (\S+)", line) for line in process.stderr)
            yield next(match[1] for match in found if match)
            process.terminate()


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """The browser, for this test; its windows are closed after it."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect_over_cdp(chromium)
        yield browser
        await browser.close()


@pytest.fixture
def allowed_errors() -> list[str]:
    """What a console may say: a test adds what it provokes, as a regular expression."""
    return []


@pytest.fixture
async def open_context(browser: Browser, allowed_errors: list[str]) -> AsyncIterator[OpenContext]:
    """Open windows; no console may show an error, no script may fail, and nothing may break the policy."""
    complaints: list[str] = []

    async def open_one(**options: Any) -> BrowserContext:
        context = await browser.new_context(**{"viewport": DESKTOP, **options})
        context.on("console", lambda line: complaints.append(line.text) if line.type in {"error", "warning"} else None)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        await context.add_init_script(REPORT_POLICY)
        return context

    yield open_one
    assert [text for text in complaints if not any(re.search(allowed, text) for allowed in allowed_errors)] == []


@pytest.fixture
async def context(open_context: OpenContext) -> BrowserContext:
    """One window, as wide as on a desk."""
    return await open_context()
