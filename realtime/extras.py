"""What can be left out of an installation, and how one is told that something is missing."""

from __future__ import annotations

from importlib.util import find_spec

from realtime.settings import SettingsError

MODULES = {
    "redis": ("redis", "saq", "throttled"),
    "openai": ("openai",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
}
"""The modules that each extra of the package brings."""


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in MODULES[extra] if not _is_installed(name)]


def require(extra: str, setting: str) -> None:
    """Raise `SettingsError`, with what to do, where `setting` needs an extra that is not installed."""
    if names := missing(extra):
        raise SettingsError(
            f"{setting} needs what is not installed ({', '.join(names)}): pip install 'realtime-server[{extra}]'"
        )


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor what it is a part of
        return False
