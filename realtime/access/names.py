"""Names of what is counted, such that nobody can choose an id that makes them somebody else's."""

from __future__ import annotations

import hashlib


def joined(*parts: str) -> str:
    """One name of several parts, whatever characters they hold: other parts make another name."""
    return ":".join(part.replace("%", "%25").replace(":", "%3A") for part in parts)


def key(prefix: str, name: str) -> str:
    """The key of a name in Redis: of bounded length, without the name, and a hash tag of its own."""
    return f"{prefix}{{{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()}}}"
