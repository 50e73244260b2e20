"""realtime: a WebSocket-first session server for AI backends."""

__version__ = "0.2.0"
