"""The Python client of a realtime server.

async with connect("http://127.0.0.1:8000") as session:
    async for event in session.respond("Hello"):
        match event:
            case OutputTextDelta(delta=delta):
                print(delta, end="")
"""

from realtime.client.connection import is_token
from realtime.client.errors import MessageTooLarge, QueueFull, RealtimeError, SessionClosed
from realtime.client.events import Event, ResponseEvent, TaskEvent, UnknownEvent
from realtime.client.session import Session, connect
from realtime.client.state import Answer, Task
from realtime.client.streams import ResponseStream, TaskStream

__all__ = [
    "Answer",
    "Event",
    "MessageTooLarge",
    "QueueFull",
    "RealtimeError",
    "ResponseEvent",
    "ResponseStream",
    "Session",
    "SessionClosed",
    "Task",
    "TaskEvent",
    "TaskStream",
    "UnknownEvent",
    "connect",
    "is_token",
]
