"""`realtime check` tells what is wrong before a server is started, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from realtime.check import Finding, findings, run
from realtime.settings import SECRETS
from realtime.store.base import TaskRef
from realtime.tasks.saq_queue import SaqQueue
from tests.access.provider import provider
from tests.access.signing import EC, SECRET, jwk, pem
from tests.support.ports import free_port
from tests.support.redis_server import redis_cluster, redis_server

CANARY = "canary-7f3a"


async def found(about: str, **variables: str) -> list[Finding]:
    """What is found of one thing, in an environment of these settings."""
    environ = {f"REALTIME_{name.upper()}": value for name, value in variables.items()}
    return [one for one in await findings(environ) if one.about == about]


async def only(about: str, **variables: str) -> tuple[str, str]:
    """The one finding."""
    [one] = await found(about, **variables)
    return one.status, one.text


def test_an_empty_environment_has_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """It is how one begins: warnings, a line each, and status 0."""
    assert run({}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"ok", "warning"}
    assert {line.split()[1] for line in lines} == {"settings", "store", "model", "tokens", "limits"}


def test_what_is_wrong_shows_in_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    assert run({"REALTIME_PORT": "70000"}) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("wrong    settings  REALTIME_PORT='70000' is not allowed")


async def test_a_variable_that_is_no_setting_is_named() -> None:
    """Its value is not; and that of the client's is known."""
    status, text = await only("settings", ports=CANARY, token="a.b.c")
    assert (status, text.split()[0]) == ("warning", "REALTIME_PORTS")
    assert CANARY not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate_responses", "0/minute"),
        ("rate_connections", "0/second"),
        ("prices", "m=1"),
        ("allowed_origins", "example.org"),
        ("trusted_proxies", "0.0.0.0/0"),
        ("seal_keys", f"a:{CANARY}"),
        ("tasks", "no.such.module"),
    ],
)
async def test_what_only_the_start_would_find_is_found(name: str, value: str) -> None:
    """A server is composed of the settings, as far as that asks nobody."""
    status, text = await only("settings", **{name: value})
    assert status == "wrong"
    assert f"REALTIME_{name.upper()}" in text
    assert CANARY not in text


# --- stores ----------------------------------------------------------------------------------------------------------


async def test_a_redis_that_answers_is_all_right() -> None:
    """For sessions and for the queue."""
    async with redis_server() as redis:
        assert (await only("store", redis_url=redis.url))[0] == "ok"
        assert (await only("queue", redis_url=redis.url))[0] == "ok"


async def test_tasks_that_wait_without_a_worker_are_found() -> None:
    """With what to start; where none wait there is nothing to say."""
    async with redis_server() as redis:
        assert await found("tasks", redis_url=redis.url) == []
        async with SaqQueue(redis.url, (), slots=1, lease_s=10, ttl_s=60) as queue:
            await queue.submit(TaskRef("sess_1", "task_1", "summarise"))
        status, text = await only("tasks", redis_url=redis.url)
        assert status == "warning"
        assert text.startswith("1 wait, and no worker runs them: start realtime worker")


async def test_a_redis_that_is_not_there_is_wrong() -> None:
    """Its password is not told."""
    url = f"redis://:{CANARY}@127.0.0.1:{free_port()}/0"
    status, text = await only("store", redis_url=url)
    assert status == "wrong"
    assert "does not answer" in text
    assert CANARY not in text


async def test_a_redis_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is not there."""
    monkeypatch.setattr("realtime.check.REDIS_S", 0.2)
    async with redis_server() as redis:
        redis.pause()
        try:
            status, text = await only("store", redis_url=redis.url)
        finally:
            redis.resume()
    assert (status, "does not answer" in text) == ("wrong", True)


async def test_a_redis_that_wants_another_password_is_wrong() -> None:
    """It says so itself."""
    async with redis_server(password=CANARY) as redis:
        status, text = await only("store", redis_url=redis.url.replace(CANARY, "other"))
    assert status == "wrong"
    assert "refuses" in text
    assert "other" not in text


async def test_the_queue_may_be_elsewhere() -> None:
    """And be the one that is wrong."""
    async with redis_server() as redis:
        url = f"redis://127.0.0.1:{free_port()}"
        assert (await only("store", redis_url=redis.url, queue_redis_url=url))[0] == "ok"
        status, text = await only("queue", redis_url=redis.url, queue_redis_url=url)
    assert (status, text.split()[0]) == ("wrong", "REALTIME_QUEUE_REDIS_URL")


async def test_a_redis_that_may_evict_is_wrong() -> None:
    """It would throw sessions away."""
    async with redis_server(maxmemory_policy="allkeys-lru") as redis:
        status, text = await only("store", redis_url=redis.url)
    assert (status, "set maxmemory-policy to noeviction" in text) == ("wrong", True)


async def test_a_cluster_will_do_for_sessions_but_not_for_the_queue() -> None:
    """Which needs a server of its own then."""
    async with redis_cluster() as cluster:
        assert (await only("store", redis_url=cluster.url))[0] == "ok"
        status, text = await only("queue", redis_url=cluster.url)
    assert (status, "REALTIME_QUEUE_REDIS_URL" in text) == ("wrong", True)


# --- who answers, who asks -------------------------------------------------------------------------------------------


async def test_a_responder_without_its_key_is_wrong() -> None:
    """The server would not start."""
    assert await only("model", responder="anthropic") == (
        "wrong",
        "REALTIME_RESPONDER='anthropic' needs ANTHROPIC_API_KEY, which is not set",
    )


async def test_a_key_is_enough_for_a_model() -> None:
    """It is not told, and not tried: that would cost money."""
    environ = {"ANTHROPIC_API_KEY": CANARY, "REALTIME_MODEL": "model-1"}
    [one] = [one for one in await findings(environ) if one.about == "model"]
    assert (one.status, one.text.split()[0], CANARY in one.text) == ("ok", "model-1", False)


async def test_a_secret_is_all_that_tokens_need() -> None:
    """At any address."""
    assert (await only("tokens", auth_secret=SECRET, host="0.0.0.0"))[0] == "ok"


async def test_an_address_that_others_can_reach_needs_tokens() -> None:
    """The server would not start."""
    status, text = await only("tokens", host="0.0.0.0")
    assert status == "wrong"
    assert "REALTIME_HOST='0.0.0.0' can be reached by others" in text


async def test_a_key_that_can_not_be_read_is_wrong() -> None:
    """And is not repeated."""
    status, text = await only("tokens", auth_public_key=CANARY)
    assert (status, CANARY in text) == ("wrong", False)


async def test_tokens_for_anybody_are_warned_of() -> None:
    """A provider makes them for many servers."""
    statuses = [one.status for one in await found("tokens", auth_public_key=pem(EC))]
    assert statuses == ["ok", "warning"]
    assert (await only("tokens", auth_public_key=pem(EC), auth_audience="here"))[0] == "ok"


async def test_the_keys_of_a_provider_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There have to be some."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    async with provider(tmp_path) as shown:
        monkeypatch.setenv("SSL_CERT_FILE", str(shown.certificate))
        shown.show(jwk(EC, "a"))
        assert (await only("tokens", auth_jwks_url=shown.url, auth_audience="here"))[0] == "ok"
        shown.show()
        assert (await only("tokens", auth_jwks_url=shown.url, auth_audience="here"))[0] == "wrong"
        shown.fail()
        status, text = await only("tokens", auth_jwks_url=shown.url, auth_audience="here")
    assert (status, "HTTP status 500" in text) == ("wrong", True)


async def test_content_that_is_not_sealed_is_warned_of() -> None:
    """And keys are counted, not told."""
    async with redis_server() as redis:
        assert (await only("sealing", redis_url=redis.url))[0] == "warning"
        status, text = await only("sealing", redis_url=redis.url, seal_keys=f"a:{CANARY}")
    assert (status, CANARY in text) == ("ok", False)


async def test_no_secret_is_told() -> None:
    """Not even one that is wrong."""
    for name in SECRETS:
        texts = [one.text for one in await findings({f"REALTIME_{name.upper()}": CANARY})]
        assert CANARY not in "".join(texts)
