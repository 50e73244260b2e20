"""The command line: `realtime serve`, `realtime worker`, `realtime chat`."""

from __future__ import annotations

import ipaddress
import sys
from typing import TYPE_CHECKING, Any

import click

from realtime import __version__

if TYPE_CHECKING:
    from realtime.settings import Settings


@click.group()
@click.version_option(__version__, prog_name="realtime")
def main() -> None:
    """A WebSocket-first session server for AI backends."""


@main.command()
@click.option("--host", default=None, help="The address to bind to (REALTIME_HOST, default 127.0.0.1).")
@click.option("--port", default=None, help="The port (REALTIME_PORT, default 8000).")
@click.option(
    "--workers",
    default=1,
    type=click.IntRange(min=1),
    show_default=True,
    help="Processes; more than one needs REALTIME_REDIS_URL.",
)
@click.option("--insecure-no-auth", is_flag=True, help="Allow an address that others can reach.")
@click.option("--fd", default=None, type=int, hidden=True, help="Be a worker on this listening socket.")
def serve(host: str | None, port: str | None, workers: int, insecure_no_auth: bool, fd: int | None) -> None:
    """Run the server."""
    from realtime.settings import SettingsError

    try:
        sys.exit(_serve(_given(host=host, port=port), workers, insecure_no_auth, fd))
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


def _serve(overrides: dict[str, Any], workers: int, insecure_no_auth: bool, fd: int | None) -> int:
    from realtime.app import create_app
    from realtime.observe import logs
    from realtime.server import run
    from realtime.settings import load_settings, unknown_settings
    from realtime.workers import work

    settings = load_settings(**overrides)
    _check(settings, workers, insecure_no_auth)
    logs.configure(settings.log_format, settings.log_level)
    app = create_app(settings=settings)
    if fd is not None:
        work(app, settings, fd)
        return 0
    for name in unknown_settings():
        logs.warning("unknown setting", name=name)
    if workers > 1:
        return _keep_workers(settings, workers)
    run(app, settings)
    return 0


def _check(settings: Settings, workers: int, insecure_no_auth: bool) -> None:
    from realtime.settings import SettingsError

    if workers > 1 and not settings.redis_url:
        raise SettingsError(f"--workers {workers} needs REALTIME_REDIS_URL: a store that processes can share")
    if not insecure_no_auth and not _is_loopback(settings.host):
        raise SettingsError(
            f"REALTIME_HOST={settings.host!r} can be reached by others, and there is no authentication: "
            "bind to 127.0.0.1, or give --insecure-no-auth if that is meant"
        )


def _keep_workers(settings: Settings, count: int) -> int:
    from realtime.server import open_listener, say_where
    from realtime.workers import MARGIN_S, Workers, keep

    listener = open_listener(settings)
    command = [sys.executable, *sys.orig_argv[1:]]
    workers = Workers(command, listener, count=count, patience_s=settings.drain_s + MARGIN_S)
    return keep(workers, lambda: say_where(listener, f" ({count} workers)"))


@main.command()
def worker() -> None:
    """Run background tasks, beside servers that share a Redis."""
    from realtime.observe import logs
    from realtime.settings import SettingsError, load_settings
    from realtime.tasks.process import run

    try:
        settings = load_settings()
        logs.configure(settings.log_format, settings.log_level)
        run(settings)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--session", default=None, help="Go on with this session.")
def chat(url: str, session: str | None) -> None:
    """Talk to a server from the terminal."""
    from realtime.chat import run

    sys.exit(run(url, session))


if __name__ == "__main__":
    main()
