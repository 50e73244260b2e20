"""Which responder the settings and the environment mean."""

from __future__ import annotations

import os
from collections.abc import Mapping

from realtime.responders import anthropic
from realtime.responders import demo as demo_responder
from realtime.responders.base import Responder
from realtime.settings import Settings, SettingsError


def choose(settings: Settings, environ: Mapping[str, str] = os.environ) -> tuple[Responder, str]:
    """The responder and its default model. Raises `SettingsError` where the one asked for can't work."""
    has_key = bool(environ.get("ANTHROPIC_API_KEY"))
    name = settings.responder
    if name == "auto":
        name = "anthropic" if has_key else "demo"
    if name == "demo":
        return demo_responder.demo, demo_responder.MODEL
    if not has_key:
        raise SettingsError("REALTIME_RESPONDER='anthropic' needs ANTHROPIC_API_KEY, which is not set")
    responder = anthropic.AnthropicResponder(
        thinking=settings.thinking == "adaptive",
        retry_s=settings.upstream_retry_s,
        max_connections=settings.upstream_max_connections,
    )
    return responder, anthropic.DEFAULT_MODEL
