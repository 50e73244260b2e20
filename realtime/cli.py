"""The command line: `realtime serve`, `worker`, `chat`, `token` and `check`."""

from __future__ import annotations

import re
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
    run(app, settings, insecure_no_auth=insecure_no_auth)
    return 0


def _check(settings: Settings, workers: int, insecure_no_auth: bool) -> None:
    from realtime.check import check_reach
    from realtime.observe import traces
    from realtime.settings import SettingsError

    if workers > 1 and not settings.redis_url:
        raise SettingsError(f"--workers {workers} needs REALTIME_REDIS_URL: a store that processes can share")
    if not insecure_no_auth:
        check_reach(settings)
    if workers > 1:  # they would say so each, and come again
        traces.check(settings.traces)


def _keep_workers(settings: Settings, count: int) -> int:
    from realtime.server import open_listener, say_where
    from realtime.workers import MARGIN_S, Workers, counting_together, keep

    listener = open_listener(settings)
    command = [sys.executable, *sys.orig_argv[1:]]
    patience_s = settings.drain_s + MARGIN_S
    with counting_together() as ended:
        workers = Workers(command, listener, count=count, patience_s=patience_s, ended=ended)
        return keep(workers, lambda: say_where(listener, f" ({count} workers)"))


@main.command()
@click.option("--metrics-port", default=None, help="Show metrics there, on 127.0.0.1 (REALTIME_WORKER_METRICS_PORT).")
def worker(metrics_port: str | None) -> None:
    """Run background tasks, beside servers that share a Redis."""
    from realtime.observe import logs
    from realtime.settings import SettingsError, load_settings
    from realtime.tasks.process import run

    try:
        settings = load_settings(**_given(worker_metrics_port=metrics_port))
        logs.configure(settings.log_format, settings.log_level)
        run(settings)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@main.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--session", default=None, help="Go on with this session.")
@click.option(
    "--token", default=None, envvar="REALTIME_TOKEN", help="Who you are, if the server asks (REALTIME_TOKEN)."
)
def chat(url: str, session: str | None, token: str | None) -> None:
    """Talk to a server from the terminal, or from a script.

    /task NAME {…} starts a task, /cancel stops it; a line that begins with // says one that begins with /.
    """
    from realtime.chat import run

    sys.exit(run(url, session, token))


def _seconds(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    """The seconds in `90s`, `15m`, `1h` or `7d`."""
    found = re.fullmatch(r"([1-9]\d{0,8})([smhd])", text, re.ASCII)
    if found is None:
        raise click.BadParameter(f"{text!r} is no time: expected for example 90s, 15m, 1h or 7d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


@main.command()
@click.option("--user", required=True, help="Whom it is for.")
@click.option("--session", default=None, help="The only session that it is good for.")
@click.option("--ttl", "ttl_s", default="1h", show_default=True, callback=_seconds, help="For how long.")
@click.option("--scope", default=None, help='What it allows: "session task oneshot admin" (all but admin).')
def token(user: str, session: str | None, ttl_s: int, scope: str | None) -> None:
    """Print a token, signed with REALTIME_AUTH_SECRET."""
    from realtime.access.claims import SCOPES
    from realtime.access.tokens import sign
    from realtime.settings import SettingsError, load_settings

    scopes = None if scope is None else scope.split()
    if unknown := set(scopes or ()) - SCOPES:
        raise click.BadParameter(
            f"there is no {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(SCOPES))}"
        )
    try:
        settings = load_settings()
        click.echo(sign(settings, user=user, session_id=session, ttl_s=ttl_s, scopes=scopes))
        if ttl_s > settings.auth_revocation_s:
            click.echo("It lives longer than revocations are remembered: see REALTIME_AUTH_REVOCATION_S.", err=True)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None


@main.command()
def check() -> None:
    """Say what is wrong with the settings and what they need, and what to do."""
    from realtime.check import run

    sys.exit(run())


if __name__ == "__main__":
    main()
