"""The dashboard and the alerts in docs/ ask for metrics and labels that exist, in a way that makes sense of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realtime.observe import metrics

DOCS = Path(__file__).resolve().parents[1] / "docs"
DASHBOARD: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text())
ALERTS: list[dict[str, Any]] = msgspec.yaml.decode((DOCS / "alerts.yml").read_bytes())["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SCRAPED = {"instance", "job"}
"""Labels that Prometheus gives to everything."""


def queries() -> Iterator[tuple[str, str, str]]:
    """Where each expression stands, the expression, and what is written with its labels."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for alert in ALERTS:
        yield alert["alert"], alert["expr"], json.dumps(alert["annotations"]).replace("$labels.", "")


EXPRESSIONS = [pytest.param(expression, legend, id=f"{where}: {expression}") for where, expression, legend in queries()]


def asked(expression: str) -> dict[str, str]:
    """By the series that an expression names, the metric that each is of; fails for one that there is not."""
    found = {}
    for series in re.findall(r"\brealtime_\w+", expression):
        stem = re.sub(r"_(bucket|sum|count)$", "", series)
        metric = series if series in metrics.LABELS else stem
        assert metric in metrics.LABELS, f"there is no {series}"
        assert (metric == series) == (not is_histogram(metric)), f"{series} is no series"
        found[series] = metric
    return found


def is_histogram(metric: str) -> bool:
    """Whether its series are buckets."""
    return any(one.name == metric and one.type == "histogram" for one in metrics.REGISTRY.collect())


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
def test_metrics_and_labels_exist(expression: str, legend: str) -> None:
    """Those that are selected and grouped by, and those that a legend or a text shows, which have to be left."""
    known = set.intersection(*({*metrics.LABELS[metric], *SCRAPED, "le"} for metric in asked(expression).values()))
    grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
    selected = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", expression))
    assert grouped | selected <= known
    assert set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend)) <= grouped - {"le"}


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
def test_each_kind_of_metric_is_asked_as_it_has_to_be(expression: str, legend: str) -> None:
    """What only grows as a rate, a distribution by its buckets, and what all processes tell alike by its maximum."""
    for series in asked(expression):
        grows = series.endswith(("_total", "_bucket", "_sum", "_count"))
        assert grows == bool(re.search(rf"(rate|increase)\({series}\b", expression)), series
        if series.endswith("_bucket"):
            assert re.search(rf"histogram_quantile\([\d.]+, sum by \(le\b[^)]*\) \(rate\({series}", expression)
    assert "realtime_tasks_unfinished" not in expression or "max(realtime_tasks_unfinished)" in expression


def test_no_metric_is_left_out() -> None:
    """Whatever is counted can be seen on the dashboard."""
    shown = {metric for panel in PANELS for target in panel["targets"] for metric in asked(target["expr"]).values()}
    assert shown == set(metrics.LABELS)


def test_the_choice_of_instances_is_made_of_a_metric_that_exists() -> None:
    """The one whose label the variable lists."""
    [variable] = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert asked(variable["query"]["query"])


def test_panels_stand_beside_each_other() -> None:
    """None covers another one, each has a name and an id of its own, and the data source that is chosen above."""
    for one, other in combinations(DASHBOARD["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, (one["title"], other["title"])
        assert one["id"] != other["id"]
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_alerts_say_what_is_wrong() -> None:
    """Each waits for a while, says how urgent it is, and has a name of its own."""
    assert all(alert["for"] and alert["labels"]["severity"] in {"page", "ticket"} for alert in ALERTS)
    assert all(alert["annotations"]["summary"] for alert in ALERTS)
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
