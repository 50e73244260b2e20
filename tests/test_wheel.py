"""The wheel is the package, with the page inside of it, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import realtime
from tests.support.markdown import blocks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from what is here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_has_the_package_and_the_page(wheel: zipfile.ZipFile) -> None:
    """Every module and every static file, byte for byte, and nothing of the tests or of the checkout."""
    held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {str(file.relative_to(ROOT)): file for file in (ROOT / "realtime").rglob("*.py")}
    modules["realtime/py.typed"] = ROOT / "realtime/py.typed"
    page = {f"realtime/{file.relative_to(ROOT)}": file for file in (ROOT / "static").rglob("*") if file.is_file()}
    assert "realtime/static/index.html" in page
    assert held == {name: file.read_bytes() for name, file in {**modules, **page}.items()}


def test_wheel_describes_itself_without_what_is_not_there(wheel: zipfile.ZipFile) -> None:
    """Its text is read on an index page: it has no link or picture of the repository, and its code is the README's."""
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    told = Parser().parsestr(wheel.read(name).decode()).get_payload()
    assert isinstance(told, str)
    assert told.startswith("# realtime\n")
    assert "](" not in told
    assert "<" not in told
    [shell, program] = [block.text for block in blocks(ROOT / "docs/package/README.md")]
    assert shell.splitlines() == ["pip install realtime-server", "realtime serve"]
    assert shell in told
    assert program in [block.text for block in blocks(ROOT / "README.md")]


def test_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    """Its version, the Pythons that it runs on, and Redis and OpenAI as extras only."""
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    told = Parser().parsestr(wheel.read(name).decode())
    assert (told["Name"], told["Version"]) == ("realtime-server", realtime.__version__)
    assert told["Requires-Python"] == ">=3.11"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(
        told.get_all("Classifier", [])
    )
    extras: dict[str, str] = {}
    for one in told.get_all("Requires-Dist", []):
        if found := re.match(r"(\w+).*extra == '(\w+)'", one):
            extras[found[1]] = found[2]
    assert (extras["redis"], extras["saq"], extras["openai"]) == ("redis", "redis", "openai")
    [entry] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "realtime = realtime.cli:main" in wheel.read(entry).decode()
