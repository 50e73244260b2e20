"""Programs of the system that tests run."""

import os
import shutil
from collections.abc import Sequence

import pytest


def program(name: str) -> str:
    """The path of a program. Where it is missing the test is skipped, visibly; in CI it fails."""
    # nginx is where only root's PATH leads.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if found is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"{name} is missing (make test-packages)")
    return found


def bound(command: Sequence[str]) -> list[str]:
    """`command`, but killed when the thread that starts it ends, also if nobody is left to stop it. On Linux.

    What it has started itself by then goes on.
    """
    setpriv = shutil.which("setpriv")
    return [*([setpriv, "--pdeathsig", "KILL"] if setpriv else []), *command]
