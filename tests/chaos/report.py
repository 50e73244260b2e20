"""What a chaos run came to, in few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.chaos.run import Outcome

MOST_SHOWN = 40


def report(outcome: Outcome) -> str:
    """The figures of a run, and its violations."""
    site, options = outcome.site, outcome.site.options
    readers = outcome.readers
    lines = [
        f"seed {options.seed}: {options.seconds:g} s of faults, {len(outcome.slots)} instances, lease "
        f"{options.lease_s:g} s, drain {options.drain_s:g} s{', the naive control' if options.control else ''}",
        f"sessions {outcome.sessions}, readers {len(readers)}, "
        f"resets {sum(len(reader.transcript.resets) for reader in readers)}, "
        f"lives of instances {sum(len(slot.lives) for slot in outcome.slots)}, "
        f"Redis lost acknowledged data: {'yes' if outcome.redis_lost else 'no'}",
        *(f"  {name}: {count}" for name, count in sorted(site.counts.items())),
        *_server_errors(line for slot in outcome.slots for line in slot.log),
        f"violations {len(site.violations)}",
    ]
    kinds = Counter(violation.kind for violation in site.violations)
    lines += [f"  {count} x {kind}" for kind, count in kinds.most_common()]
    lines += [f"    {str(violation)[:700]}" for violation in site.violations[:MOST_SHOWN]]
    return "\n".join(lines)


def _server_errors(log: Iterable[str]) -> list[str]:
    """What the instances have logged, each kind of line once."""
    kinds = Counter(_without_time(line) for line in log if '"level"' in line or "Traceback" in line)
    return [f"  logged {count} times: {line[:600]}" for line, count in kinds.most_common(15)]


def _without_time(line: str) -> str:
    return line.partition('"timestamp"')[0]
