"""Workers that don't wait, for the tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tasks.workplace import hurried


@pytest.fixture
def reports() -> Iterator[list[BaseException]]:
    """What was reported to the log; workers wait for next to nothing meanwhile."""
    with hurried() as found:
        yield found
