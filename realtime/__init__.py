"""realtime: a WebSocket-first session server for AI backends."""

__version__ = "0.5.0"

from realtime.errors import TaskError
from realtime.offload import offload
from realtime.tasks.context import Context
from realtime.tasks.registry import task

__all__ = ["Context", "TaskError", "offload", "task"]
