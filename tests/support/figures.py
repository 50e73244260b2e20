"""What `/metrics` shows, as numbers."""

from __future__ import annotations

import asyncio

import httpx
from prometheus_client.parser import text_string_to_metric_families

POLL_S = 0.05
PATIENCE_S = 20.0


class Figures:
    """All samples at one moment; one that is not there counts as 0."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def of(self, name: str, /, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )


async def figures(url: str) -> Figures:
    """What a server or a worker shows now, over a connection of its own."""
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as http:
        answer = await http.get(f"{url}/metrics")
    assert answer.status_code == 200, answer.text
    return Figures(answer.text)


async def until_shown(url: str, value: float, name: str, /, **labels: str) -> None:
    """Return once a metric has that value: what processes tell each other may come late."""
    shown = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (shown := (await figures(url)).of(name, **labels)) != value:  # noqa: ASYNC110  # of another process
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"{name}{labels} is {shown}, and not {value}") from None
