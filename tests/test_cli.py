"""The command line's small commands, and what keeps `realtime serve` from being open to everybody."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from realtime.access.tokens import Claims, make_verifier
from realtime.check import check_reach
from realtime.cli import main
from realtime.settings import Settings, SettingsError
from tests.access.signing import EC, SECRET, pem

ENVIRONMENT = {"REALTIME_AUTH_SECRET": SECRET, "REALTIME_AUTH_AUDIENCE": "here"}


def token(*arguments: str, environ: dict[str, str] = ENVIRONMENT) -> Result:
    """What `realtime token` comes to."""
    return CliRunner(env=environ).invoke(main, ["token", *arguments])


async def said(*arguments: str) -> Claims:
    """What the token says that it prints."""
    result = token(*arguments)
    assert result.exit_code == 0, result.output
    verifier = make_verifier(Settings(auth_secret=SECRET, auth_audience="here"))
    assert verifier is not None
    return await verifier.verify(result.stdout.removesuffix("\n"))


async def test_a_token_is_printed_and_nothing_else() -> None:
    """One that the server of the same environment believes."""
    claims = await said("--user", "anna", "--session", "sess_1", "--scope", "task session")
    assert (claims.user, claims.session_id, sorted(claims.scopes)) == ("anna", "sess_1", ["session", "task"])


@pytest.mark.parametrize(
    ("given", "ttl_s"),
    [
        ([], 3600),
        (["--ttl", "90s"], 90),
        (["--ttl", "15m"], 900),
        (["--ttl", "1h"], 3600),
        (["--ttl", "7d"], 604_800),
    ],
)
async def test_a_token_lasts_as_long_as_is_said(given: list[str], ttl_s: int) -> None:
    """An hour, if nothing is."""
    claims = await said("--user", "anna", *given)
    assert claims.issued_at is not None
    assert claims.expires_at - claims.issued_at == ttl_s


def test_a_token_that_outlives_revocations_is_made_with_a_warning() -> None:
    """Once a revocation is forgotten it would count again."""
    assert "REALTIME_AUTH_REVOCATION_S" not in token("--user", "anna", "--ttl", "1d").stderr
    assert "REALTIME_AUTH_REVOCATION_S" in token("--user", "anna", "--ttl", "2d").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--user", ""],
        ["--user", "anna", "--ttl", "1"],
        ["--user", "anna", "--ttl", "0s"],
        ["--user", "anna", "--ttl", "-1h"],
        ["--user", "anna", "--ttl", "1w"],
        ["--user", "anna", "--ttl", "999999999d"],
        ["--user", "anna", "--session", "no id"],
        ["--user", "anna", "--scope", "everything"],
    ],
)
def test_what_no_token_can_say_is_refused(arguments: list[str]) -> None:
    """With a word about it, and no traceback."""
    result = token(*arguments)
    assert result.exit_code in {1, 2}
    assert "Error: " in result.output
    assert isinstance(result.exception, SystemExit)


def test_without_a_secret_no_token_is_made() -> None:
    """It says which setting is missing."""
    result = token("--user", "anna", environ={"REALTIME_AUTH_SECRET": ""})
    assert (result.exit_code, "REALTIME_AUTH_SECRET is not set" in result.output) == (1, True)


def test_check_is_a_command() -> None:
    """Its status is that of what it finds."""
    result = CliRunner(env={"REALTIME_PORT": "no port"}).invoke(main, ["check"])
    assert (result.exit_code, result.output.split()[0]) == (1, "wrong")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "realtime.example.org"])
def test_an_open_server_needs_an_address_that_nobody_else_reaches(host: str) -> None:
    """Or a key."""
    with pytest.raises(SettingsError, match="--insecure-no-auth"):
        check_reach(Settings(host=host))
    check_reach(Settings(host=host, auth_secret=SECRET))
    check_reach(Settings(host=host, auth_public_key=pem(EC)))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_at_a_loopback_address_nobody_has_to_be_known(host: str) -> None:
    """Only this machine gets there."""
    check_reach(Settings(host=host))
