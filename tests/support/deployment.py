"""What docker-compose.yml and the Dockerfile say, read as far as it goes without an engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE_FILE = ROOT / "docker-compose.yml"
INSTANCES = ("realtime-1", "realtime-2")


def services() -> dict[str, dict[str, Any]]:
    """The services of the compose file, by name; merged where they share something, variables not filled in."""
    return _section("services")


def networks() -> dict[str, dict[str, Any]]:
    """The networks of the compose file, likewise."""
    return _section("networks")


def _section(name: str) -> dict[str, dict[str, Any]]:
    file = msgspec.yaml.decode(COMPOSE_FILE.read_bytes(), type=dict[str, Any])
    found: dict[str, dict[str, Any]] = file[name]
    return found


def filled(text: str) -> str:
    """A value as it is where none of the variables in it is set: `${NAME:-default}`."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """The variables that a service is given where the shell that starts it has none of them."""
    return {name: filled(str(value)) for name, value in service["environment"].items() if value is not None}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, in order: the word, and what follows it."""
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def last_stage() -> list[tuple[str, str]]:
    """Those that make the image that runs."""
    found = instructions()
    start = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def instruction(name: str) -> str:
    """What follows the only instruction of that name in the last stage."""
    (found,) = [rest for word, rest in last_stage() if word == name]
    return found


def words(name: str) -> list[str]:
    """The words of an instruction in the form that needs no shell."""
    found: list[str] = json.loads(instruction(name))
    return found


def image_environment() -> dict[str, str]:
    """The variables that the image sets, but for the PATH."""
    pairs = (pair.partition("=") for pair in instruction("ENV").split())
    return {name: value for name, _, value in pairs if name != "PATH"}


def image_health_check() -> list[str]:
    """The command by which the image tells whether it is well."""
    found: list[str] = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    return found
