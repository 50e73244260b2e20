"""Random faults on three instances, nginx and Redis: nothing is lost, doubled or left open, and the checks can tell."""

from __future__ import annotations

import pytest

from tests.chaos.options import Options
from tests.chaos.report import report
from tests.chaos.run import run
from tests.support.scale import scaled


@pytest.mark.timeout(200)
async def test_nothing_is_lost_under_random_faults() -> None:
    """Instances and Redis are killed, paused and cut off, and clients come and go."""
    outcome = await run(Options(seed=4, seconds=scaled(60, 12), sessions=scaled(50, 12)))
    print(report(outcome))
    assert outcome.site.counts["end: completed end_turn"] > 20
    assert [str(violation) for violation in outcome.site.violations] == []


@pytest.mark.timeout(60)
async def test_a_server_of_the_usual_kind_fails_the_same_checks() -> None:
    """Readers find gaps, tokens are lost, keys never expire: the checks find it."""
    outcome = await run(Options(seed=4, seconds=5, sessions=10, control=True))
    print(report(outcome))
    kinds = {violation.kind for violation in outcome.site.violations}
    assert {"a seam", "a key without an end"} <= kinds
    assert kinds & {"stored tokens lost", "read tokens lost", "completed and not whole"}
