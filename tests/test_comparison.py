"""The README's table beside others: what it says of this server leads to a test that shows it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.test_docs import section, tables

ROOT = Path(__file__).resolve().parent.parent
OURS = re.compile(r'\[yes\]\((?P<file>tests/[\w/]+\.py) "(?P<function>test_\w+)"\)')
THEIRS = re.compile(r"–|\[(?P<word>yes|part|no)\]\(https://[^\s)]+\)")
[TABLE] = tables(section((ROOT / "README.md").read_text(), "Beside others"))
PAGE = (ROOT / "docs/comparison.md").read_text()
NAMES = {"AI SDK + resumable-stream": "AI SDK and resumable-stream"}


def functions(file: Path) -> set[str]:
    """The functions of a module."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


def test_each_of_our_cells_names_a_test() -> None:
    """The file and the function that it leads to are there."""
    for row in TABLE:
        found = OURS.fullmatch(row["realtime"])
        assert found, row
        assert found["function"] in functions(ROOT / found["file"]), found[0]


def test_each_of_their_cells_names_its_source() -> None:
    """What is said of others is a word that leads to where they say so, or that nothing was found."""
    cells = [cell for row in TABLE for name, cell in row.items() if name not in {"", "realtime"}]
    assert [cell for cell in cells if not THEIRS.fullmatch(cell)] == []


def test_each_part_is_explained() -> None:
    """The page says of each of the others what `part` means, as often as the table says it, and what it does better."""
    for name in list(TABLE[0])[2:]:
        told = section(PAGE, NAMES.get(name, name))
        parts = [row for row in TABLE if "[part]" in row[name]]
        assert len(re.findall(r"^- \*\*[^*]+: part\.\*\*", told, re.MULTILINE)) == len(parts), name
        assert "- **Better at**: " in told, name
