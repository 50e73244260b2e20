"""The examples of docs/clients.md are taken from the page and run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.end_to_end import echo
from tests.support.examples import output_of
from tests.support.server import running_server

PAGE = (Path(__file__).resolve().parents[2] / "docs/clients.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


async def test_the_javascript_examples_run() -> None:
    """An answer, and one more; a task, and an answer that is interrupted."""
    answers, voice = blocks("js")
    async with running_server(echo) as server:
        assert re.sub(r"\s", "", await output_of(answers, server)) == "HelloAndoncemore"
        progress, *summary = (await output_of(voice, server)).splitlines()
    assert progress == "1 of 1 summarised part 1 of 1"
    assert "A long document." in "\n".join(summary)


async def test_the_python_example_runs() -> None:
    """The same without the voice."""
    [example] = blocks("python")
    async with running_server(echo) as server:
        told = await output_of(example, server)
    assert told.startswith("HelloAnd once more\n")
    assert "A long document." in told
