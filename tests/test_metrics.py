"""What `/metrics` shows."""

from __future__ import annotations

import subprocess
import sys

from prometheus_client.parser import text_string_to_metric_families

from realtime.observe import metrics


def shown() -> dict[str, float]:
    """Every sample by its name and labels."""
    text, _ = metrics.render()
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_what_is_counted_is_shown() -> None:
    """In the format whose content type comes with it."""
    _, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    before = shown()
    metrics.LOOP_BLOCKS.inc()
    metrics.TASKS_FINISHED.labels("made_up", "completed").inc()
    metrics.TASK_ATTEMPTS.labels("made_up").inc(2)
    metrics.TASK_SECONDS.labels("made_up").observe(1.5)
    with metrics.TASKS_RUNNING.track_inprogress():
        after = shown()
    assert after["realtime_loop_blocks_total[]"] == before["realtime_loop_blocks_total[]"] + 1
    assert after["realtime_tasks_running[]"] == before["realtime_tasks_running[]"] + 1
    assert after["realtime_tasks_finished_total[('name', 'made_up'), ('status', 'completed')]"] == 1
    assert after["realtime_task_attempts_total[('name', 'made_up')]"] == 2
    assert after["realtime_task_seconds_sum[('name', 'made_up')]"] == 1.5
    assert after["realtime_task_seconds_bucket[('le', '1.0'), ('name', 'made_up')]"] == 0
    assert after["realtime_task_seconds_bucket[('le', '2.0'), ('name', 'made_up')]"] == 1


def test_no_series_tells_when_another_began() -> None:
    """That would be as many again, and several processes that count together have none."""
    metrics.MODEL_CALLS.inc()
    body, _ = metrics.render()
    assert b"realtime_model_calls_total" in body
    assert b"_created" not in body.replace(b"realtime_sessions_created", b"")


def test_only_ours_are_shown() -> None:
    """Not what a library, or who embeds this, registers globally."""
    code = (
        "import prometheus_client\n"
        "from realtime.observe import metrics\n"
        "prometheus_client.Counter('theirs', 'theirs')\n"
        "names = [line.split()[2] for line in metrics.render()[0].decode().splitlines() if line.startswith('# TYPE')]\n"
        "assert names and all(name.startswith('realtime_') for name in names), names\n"
        "assert b'realtime_' not in prometheus_client.generate_latest()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
