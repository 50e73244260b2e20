"""Which responder the settings and the environment mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from realtime.extras import require
from realtime.responders import anthropic, openai
from realtime.responders import demo as demo_responder
from realtime.responders.base import Responder
from realtime.settings import Settings, SettingsError


def choose(settings: Settings, environ: Mapping[str, str] = os.environ) -> tuple[Responder, str]:
    """The responder and its default model. Raises `SettingsError` where the one asked for can't work."""
    name = settings.responder
    if name == "auto":
        name = next((provider for provider in ("anthropic", "openai") if environ.get(_key(provider))), "demo")
    if name == "demo":
        return demo_responder.demo, demo_responder.MODEL
    _check_address(name, environ)
    if name == "openai":
        require("openai", f"REALTIME_RESPONDER={settings.responder!r} with OPENAI_API_KEY")
        return openai.OpenAIResponder(
            retry_s=settings.upstream_retry_s, max_connections=settings.upstream_max_connections
        ), openai.DEFAULT_MODEL
    responder = anthropic.AnthropicResponder(
        thinking=settings.thinking == "adaptive",
        retry_s=settings.upstream_retry_s,
        max_connections=settings.upstream_max_connections,
    )
    return responder, anthropic.DEFAULT_MODEL


def _key(provider: str) -> str:
    return f"{provider.upper()}_API_KEY"


def _check_address(provider: str, environ: Mapping[str, str]) -> None:
    """Refuse what the SDK would stumble over later; the key is a secret and not repeated."""
    key = _key(provider)
    if not environ.get(key):
        raise SettingsError(f"REALTIME_RESPONDER={provider!r} needs {key}, which is not set")
    if not environ[key].strip().isascii():
        raise SettingsError(f"{key} is not allowed: expected ASCII characters")
    variable = f"{provider.upper()}_BASE_URL"
    url = environ.get(variable) or "https://default"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(f"{variable}={url!r} is not allowed: expected a URL like https://host:port")
