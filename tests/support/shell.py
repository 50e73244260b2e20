"""Runs a page's shell blocks in one real bash after the other, which share their variables.

What would run until it is stopped (a server, a worker) is not run by bash: it is noted, with its environment, for the
test to start. So nothing listens on the port that the page names: `127.0.0.1:8000` is wherever the page's server is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support.instance import ROOT, environment

PATIENCE_S = 60.0
PRELUDE = r"""
set -e
note() { { printf '%s\0' "$@"; printf '\0'; env -0; printf '\0\0'; } >> "$NOTES"; }
for program in make uvicorn docker nginx pip npm python bench/build/{upstream,load}; do
    eval "$program() { note $program \"\$@\"; }"
done
realtime() {
    case "$1" in
    serve | worker) note realtime "$@" ;;
    chat) "$PYTHON" -m realtime "$@" --url "http://127.0.0.1:$PORT" ;;
    *) "$PYTHON" -m realtime "$@" ;;
    esac
}
# The stream of a session's events has no end: here it ends with the first response.
curl() {
    case "$*" in
    *-N*/sessions/*/events*)
        exec {events}< <(command curl --silent --show-error --fail-with-body "$@")
        sed '/^event: response.done/q' <&"$events"
        kill "$!"
        ;;
    *) command curl --silent --show-error --fail-with-body "$@" ;;
    esac
}
if [ -e "$STATE" ]; then . "$STATE"; fi
"""
EPILOGUE = r"""
theirs='NOTES|STATE|PORT|BASH\w*|PYTHON\w*|PATH|IFS|OPT\w*|PS4'
declare -p | grep -E '^declare -(x|-) [A-Z_]+=' | grep -vE " ($theirs)=" > "$STATE"
"""


class Started(NamedTuple):
    """What a block starts: its words, and the environment that it is given."""

    words: list[str]
    variables: dict[str, str]


class Shell:
    """A reader's terminals, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def run(self, text: str, port: int) -> tuple[str, list[Started]]:
        """What a block prints, and what it starts; the page's server is at `port`.

        Raises `RuntimeError`, with what it has said, if it fails.
        """
        notes = self.folder / ".notes"
        notes.write_bytes(b"")
        its = {"NOTES": str(notes), "STATE": str(self.folder / ".state"), "PYTHON": sys.executable, "PORT": str(port)}
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            f"{PRELUDE}\n{text}\n{EPILOGUE}",
            cwd=self.folder,
            env=environment({**its, "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE_S):
            told, failed = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{text}\n{told.decode()}\n{failed.decode()}")
        return told.decode(), _started(notes.read_bytes())


def _started(notes: bytes) -> list[Started]:
    found = []
    for note in notes.decode().split("\0\0\0")[:-1]:
        words, _, variables = note.partition("\0\0")
        pairs = (pair.partition("=") for pair in variables.split("\0"))
        found.append(Started(words.split("\0"), {name: value for name, _, value in pairs}))
    return found
