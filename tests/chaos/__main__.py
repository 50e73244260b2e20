"""`python -m tests.chaos --seconds 300 --seed 7`: a chaos run, whose status is 1 if something did not hold."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from tests.chaos.options import Options
from tests.chaos.report import report
from tests.chaos.run import Outcome, run


def main() -> int:
    """Run it as the command line says."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="how long there are faults")
    parser.add_argument("--sessions", type=int, default=defaults.sessions)
    parser.add_argument("--instances", type=int, default=defaults.instances)
    parser.add_argument("--lease-s", type=float, default=defaults.lease_s)
    parser.add_argument("--drain-s", type=float, default=defaults.drain_s)
    parser.add_argument("--settle-s", type=float, default=defaults.settle_s)
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default=defaults.appendfsync, help="of Redis")
    parser.add_argument("--control", action="store_true", help="the naive server, in which violations must be found")
    parser.add_argument("--events", default="", help="a file for what is done and found, and what the instances log")
    options = Options(**vars(parser.parse_args()))
    outcome = asyncio.run(_run(options))
    print(report(outcome))
    if options.events:
        with Path(options.events).open("a") as file:
            file.writelines(f"instance {slot.number}: {line}\n" for slot in outcome.slots for line in slot.log)
    return 1 if outcome.site.violations else 0


async def _run(options: Options) -> Outcome:
    """As `run`, and told to end it ends every process that it has started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(options)


if __name__ == "__main__":
    sys.exit(main())
