"""Which responder the settings and the environment mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

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
    _check_address(environ)
    responder = anthropic.AnthropicResponder(
        thinking=settings.thinking == "adaptive",
        retry_s=settings.upstream_retry_s,
        max_connections=settings.upstream_max_connections,
    )
    return responder, anthropic.DEFAULT_MODEL


def _check_address(environ: Mapping[str, str]) -> None:
    """Refuse what the SDK would stumble over later; the key is a secret and not repeated."""
    if not environ["ANTHROPIC_API_KEY"].strip().isascii():
        raise SettingsError("ANTHROPIC_API_KEY is not allowed: expected ASCII characters")
    url = environ.get("ANTHROPIC_BASE_URL") or "https://default"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(f"ANTHROPIC_BASE_URL={url!r} is not allowed: expected a URL like https://host:port")
