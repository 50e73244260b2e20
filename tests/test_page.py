"""The demo page's files, as they are."""

import re
from pathlib import Path

from realtime.page import STATIC

ENTRY = STATIC / "demo.js"


def imported(module: Path) -> set[Path]:
    """The module and all that it needs, which a browser would find out one level after the other."""
    found, waiting = set[Path](), [module]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            names = re.findall(r'^(?:import|export) [^;]*?from "([^"]+)"', module.read_text(), re.MULTILINE)
            waiting += [(module.parent / name).resolve() for name in names]
    return found


def test_every_module_is_asked_for_at_once() -> None:
    """The page names what its scripts import, all of it and nothing else, so that no level of them costs a way more."""
    page = (STATIC / "index.html").read_text()
    links = re.findall(r'<link rel="modulepreload" href="([^"]+)">', page)
    named = [(STATIC.parent / link).resolve() for link in links]
    expected = {module.relative_to(STATIC) for module in imported(ENTRY) - {ENTRY}}
    assert sorted(module.relative_to(STATIC) for module in named) == sorted(expected)
