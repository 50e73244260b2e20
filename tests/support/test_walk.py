"""A walk through a page sees what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.markdown import indented
from tests.support.walk import walk

FENCE = "```"


def written(folder: Path, *blocks: str) -> Path:
    """A page of blocks, each of which begins with its language."""
    page = folder / "page.md"
    page.write_text("# Page\n\n" + "\n\n".join(f"{FENCE}{block}\n{FENCE}" for block in blocks) + "\n")
    return page


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        pytest.param(["\nfree"], "does not say what it is", id="says-not-what-it-is"),
        pytest.param(["cobol\nDISPLAY 1."], "nothing checks", id="of-a-language-that-nothing-checks"),
        pytest.param(["sh\nfalse\ntrue"], "false", id="command-that-fails"),
        pytest.param(["sh\nrealtime serve --prot 1"], "No such option", id="option-that-there-is-not"),
        pytest.param(["sh\nREALTIME_PORT=x realtime serve"], "REALTIME_PORT", id="setting-that-is-wrong"),
        pytest.param(["sh\nmake coffee"], "coffee", id="target-that-there-is-not"),
        pytest.param(["sh\npip install 'realtime-server[coffee]'"], "coffee", id="extra-that-there-is-not"),
        pytest.param(["sh\ncurl http://127.0.0.1:8000/v1/coffee"], "error: 404", id="request-that-is-refused"),
        pytest.param(["sh\necho one\necho three", "text\none\ntwo"], "is not in", id="output-that-is-another"),
        pytest.param(['python title="broken.py"\n1 / 0'], "division by zero", id="file-that-can-not-be-imported"),
        pytest.param(
            ['python title="examples/starlette_app.py"\npass'],
            "something else",
            id="file-of-the-repository-that-is-another",
        ),
        pytest.param(["python\nraise SystemExit(3)"], "ended with 3", id="program-that-fails"),
        pytest.param(["js\nthrow new Error()"], "ended with 1", id="script-that-fails"),
        pytest.param(['json\n{"type": "response.crate"}'], "there is no", id="message-that-there-is-not"),
        pytest.param(
            ['json\n{"type": "response.create", "inptu": "Hello"}'], "not of that form", id="field-that-there-is-not"
        ),
        pytest.param(['json\n{"type": "response.create", "input": 1}'], "not of that form", id="field-of-another-type"),
        pytest.param(["json\n{type: 1}"], "malformed", id="no-json"),
        pytest.param(["yaml\n- a: [1"], "expected", id="no-yaml"),
        pytest.param(["nginx\nlocation / { coffee; }"], "unknown directive", id="directive-that-there-is-not"),
        pytest.param(["redis\nACL SETUSER a +coffee"], "Unknown command", id="command-that-redis-does-not-have"),
    ],
)
async def test_block_that_is_wrong_fails(tmp_path: Path, blocks: list[str], told: str) -> None:
    """Each language has a way to be wrong, and it is noticed."""
    with pytest.raises(Exception, match=told):
        async with walk(written(tmp_path, *blocks)) as walking:
            await walking.to_the_end()


async def test_blocks_share_a_shell_a_folder_and_a_server(tmp_path: Path) -> None:
    """What one sets is there in the next, a file can be imported, and the port is that of the page's server."""
    page = written(
        tmp_path,
        "sh\nWORD=Hello",
        'python title="words.py"\nimport math',
        "sh\nREALTIME_TOKEN_BUDGET=1000000/day realtime serve",
        'sh\ncurl --include http://127.0.0.1:8000/v1/complete -d "{\\"prompt\\": \\"$WORD\\"}"',
        'text\nratelimit-policy: …"tokens";q=1000000\n{"text":"You said: Hello.",…',
        'json\n{"type": "response.create", "input": "Hello"}',
    )
    async with walk(page) as walking:
        await walking.to_the_end()


def test_indented_code_is_found(tmp_path: Path) -> None:
    """It says not what it is; a list that goes on does not count."""
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n    make serve\n\n- One\n    and more\n\n```sh\n\n    fenced\n```\n")
    assert indented(page) == ["make serve"]
