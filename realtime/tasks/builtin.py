"""The tasks that every server has."""

from __future__ import annotations

from realtime.tasks.analyse import analyse
from realtime.tasks.clinical_note import clinical_note
from realtime.tasks.summarise import summarise

BUILTIN_TASKS = (analyse, clinical_note, summarise)
