"""How much memory a process has, from /proc."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(pid: int | str = "self", field: str = "VmRSS") -> int:
    """What a process has in memory: `VmRSS` now, `VmHWM` at its peak."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)
