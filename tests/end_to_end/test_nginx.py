"""The shipped configuration of nginx, on a real nginx: in front of real instances, and of upstreams that misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from realtime.server import make_server
from realtime.settings import Settings
from tests.access.wire import telling_server
from tests.end_to_end import PATIENCE_S, Model, Turn, echo
from tests.support.client import attached
from tests.support.http_connection import HttpConnection
from tests.support.nginx import CONFIGURATION, Nginx, command, configuration, nginx
from tests.support.ports import free_port
from tests.support.programs import program
from tests.support.scenarios import Gate
from tests.support.server import running_server
from tests.support.upstream import Dying, Upstream, refusing

CANARY = "canary-5e2d"
HEAD_TIMEOUT_S = 10.0
BODY = b'{"prompt": "hello"}'


@asynccontextmanager
async def http(proxy: Nginx, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of nginx over plain HTTP."""
    async with httpx.AsyncClient(base_url=proxy.url, trust_env=False, timeout=30, **options) as client:
        yield client


def directive(name: str) -> str:
    """The value of a directive of the shipped configuration that stands there once."""
    (value,) = re.findall(rf"^ *{name} ([^;]*);", CONFIGURATION.read_text(), re.MULTILINE)
    return str(value)


def seconds(name: str) -> float:
    """The same, for one that is a number of seconds."""
    return float(directive(name).removesuffix("s"))


async def answer_to(proxy: Nginx, head: bytes, *, then: bytes = b"") -> bytes:
    """Send part of a request, and `then` twice a second; returns what comes until nginx closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    trickling = asyncio.ensure_future(trickle(writer, then))
    try:
        writer.write(head)
        async with asyncio.timeout(3 * HEAD_TIMEOUT_S):
            return await everything(reader)
    finally:
        trickling.cancel()
        writer.transport.abort()
        await asyncio.wait([trickling])


async def trickle(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Write a piece twice a second, if there is one."""
    while piece:
        await asyncio.sleep(0.5)
        writer.write(piece)


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side closes, by FIN or RST."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while piece := await reader.read(4096):
            received += piece
    return bytes(received)


# ------------------------------------------------------------------------------------------------ the file itself


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    """nginx takes it, and warns of nothing."""
    assert check(tmp_path, configuration(tmp_path, 8080, [8001, 8002])).returncode == 0


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What `nginx -t` says of a configuration."""
    (folder / "nginx.conf").write_text(text)
    result = subprocess.run(command(folder, ("-t", "-g", "")), capture_output=True, text=True, check=False)
    assert "[warn]" not in result.stderr, result.stderr
    return result


def test_what_a_test_changes_has_to_be_there(tmp_path: Path) -> None:
    """A change that changes nothing fails, rather than testing something else."""
    with pytest.raises(ValueError, match="is not in the configuration"):
        configuration(tmp_path, 8080, [8001], {"listen 80;": "listen 81;"})


def test_every_place_to_be_changed_is_marked() -> None:
    """What names an address, a port or a file says HERE: the rest of it is the same on every machine."""
    for block in re.split(r"\n\n", CONFIGURATION.read_text()):
        for line in block.splitlines():
            if re.search(r"/tmp/|/dev/|stderr|/etc/|\blisten \d", re.sub(r"# .*", "", line)):
                assert "# HERE" in line, line
            if re.search(r"server realtime-\d", line):
                assert "# HERE" in block, block


def test_limits_and_timeouts_fit_those_of_the_server() -> None:
    """nginx cuts nothing that the server allows, and waits longer than the server does."""
    settings = Settings()
    assert directive("client_max_body_size") == f"{settings.max_body_bytes // 2**20}m"
    assert seconds("send_timeout") > settings.send_timeout_s
    quiet_s = [float(value) for value in re.findall(r"proxy_read_timeout (\d+)s;", CONFIGURATION.read_text())]
    assert min(quiet_s) > 3 * settings.ping_interval_s
    assert 120.0 in quiet_s
    assert settings.upstream_idle_timeout_s + settings.upstream_retry_s < 120
    idle_s = float(re.findall(r"keepalive 64;\n *keepalive_timeout (\d+)s;", CONFIGURATION.read_text())[0])
    assert idle_s < make_server(lambda *_: None, settings).config.timeout_keep_alive  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ streaming


async def test_a_websocket_streams_token_by_token() -> None:
    """Each piece arrives while the model is still being held back."""
    model = Model()
    async with running_server(model) as server, nginx(server.port) as proxy, attached(proxy) as client:
        response_id = await client.respond()
        turn = await model.turn()
        async with asyncio.timeout(PATIENCE_S):
            for piece in ("one ", "two ", "three"):
                turn.say(piece)
                assert (await client.until("response.output_text.delta"))["delta"] == piece
            turn.end()
            done = await client.until("response.done")
        assert (done["status"], client.transcript.texts[response_id]) == ("completed", "one two three")


async def test_server_sent_events_are_not_buffered() -> None:
    """Each event of `/v1/stream` arrives while the model is still being held back."""
    model = Model()
    async with running_server(model) as server, nginx(server.port) as proxy, http(proxy) as client:
        async with asyncio.timeout(PATIENCE_S), client.stream("POST", "/v1/stream", content=BODY) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            turn = await model.turn()
            lines = response.aiter_lines()
            for piece in ("one ", "two "):
                turn.say(piece)
                assert json.loads((await anext(lines)).removeprefix("data: ")) == {"text": piece}
                assert await anext(lines) == ""
            turn.end()
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""]


class Piecemeal(Upstream):
    """An instance whose answer comes in two pieces, the second when the gate is opened; it says nothing of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    async def answer(self, connection: HttpConnection) -> None:
        """Send the head and a piece, and then the other one."""
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 6\r\n\r\none")
        await self.gate.passed()
        await connection.send(b"two")


async def test_nothing_is_buffered_even_if_nobody_says_so() -> None:
    """The server asks for it in a header, but nginx does not depend on that."""
    async with Piecemeal() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        async with asyncio.timeout(PATIENCE_S), client.stream("GET", "/v1/sessions/x/events") as response:
            pieces = response.aiter_raw()
            assert await anext(pieces) == b"one"
            upstream.gate.open()
            assert await anext(pieces) == b"two"


async def test_the_events_of_a_task_are_not_buffered() -> None:
    """Each piece of a task's own stream arrives while the model is still being held back."""
    model = Model()
    visit = {"conversation": [{"role": "user", "content": "It hurts."}]}
    async with running_server(model) as server, nginx(server.port) as proxy, http(proxy) as client:
        made = await client.post("/v1/tasks/clinical_note", json=visit)
        async with asyncio.timeout(PATIENCE_S), client.stream("GET", made.headers["location"] + "/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            turn = await model.turn()
            lines = response.aiter_lines()
            for piece in ("one ", "two "):
                turn.say(piece)
                assert await said_in(lines, piece)
        assert (await client.delete(made.headers["location"])).status_code == 202


async def said_in(lines: AsyncIterator[str], piece: str) -> bool:
    """Whether a piece of text comes, however it is joined with what comes before."""
    async for line in lines:
        if line.startswith("data: ") and piece in json.loads(line.removeprefix("data: ")).get("delta", ""):
            return True
    return False


TASKS = ("/v1/tasks/analyse", "/v1/analyse", "/v1/summarise")


@pytest.mark.parametrize("path", TASKS)
async def test_what_makes_a_task_is_not_sent_twice(path: str) -> None:
    """An instance that died over it may have made the task. One that drains has not: the other one is asked."""
    async with Dying() as dying, Upstream() as other, nginx(dying.port, other.port) as proxy, http(proxy) as client:
        statuses = [(await client.post(path, content=BODY)).status_code for _ in range(8)]
        assert len(dying.requests) + len(other.requests) == len(statuses)
        assert (statuses.count(502), statuses.count(200)) == (len(dying.requests), len(other.requests))
        assert dying.requests
    async with refusing() as draining, Upstream() as other, nginx(draining.port, other.port) as proxy:
        async with http(proxy) as client:
            assert [(await client.post(path, content=BODY)).status_code for _ in range(8)] == [200] * 8
        assert draining.requests


@pytest.mark.parametrize("path", TASKS)
async def test_an_input_of_a_task_may_be_as_large_as_the_server_allows(path: str) -> None:
    """And no larger."""
    limit = Settings().max_body_bytes
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        assert (await client.post(path, content=b"x" * limit)).status_code == 200
        assert (await client.post(path, content=b"x" * (limit + 1))).status_code == 413


async def test_a_stop_ends_in_time_whatever_is_going_on() -> None:
    """A connection that would last for hours is closed when the workers' time to shut down is over."""
    short = {"worker_shutdown_timeout 10s": "worker_shutdown_timeout 1s"}
    async with running_server(echo) as server, nginx(server.port, replacing=short) as proxy, attached(proxy) as client:
        quitting = asyncio.ensure_future(proxy.quit())
        assert await client.answer("still here") == "still here"
        assert await client.until_closed() == 1006
        assert await quitting == 0


async def test_frames_of_any_size_pass() -> None:
    """A frame as large as they come arrives whole, in both directions."""
    text = "x" * 60_000
    async with running_server(echo) as server, nginx(server.port) as proxy, attached(proxy) as client:
        assert await client.answer(text) == text


async def test_msgpack_passes() -> None:
    """The subprotocol is agreed on through nginx."""
    async with running_server(echo) as server, nginx(server.port) as proxy:
        async with attached(proxy, subprotocol="realtime.v1.msgpack") as client:
            assert client.socket.subprotocol == "realtime.v1.msgpack"
            assert await client.answer("hello") == "hello"


async def test_hanging_up_a_websocket_reaches_the_model() -> None:
    """The last viewer leaves nginx, and the model call is closed at once."""
    model = Model()
    async with running_server(model) as server, nginx(server.port) as proxy:
        async with attached(proxy) as client:
            await client.respond()
            turn = await model.turn()
            turn.say("one ")
            await client.until("response.output_text.delta")
            client.reset()
            await let_go(turn)


async def test_hanging_up_on_server_sent_events_reaches_the_model() -> None:
    """So it is for `/v1/stream`."""
    model = Model()
    async with running_server(model) as server, nginx(server.port) as proxy, http(proxy) as client:
        async with client.stream("POST", "/v1/stream", content=BODY) as response:
            turn = await model.turn()
            turn.say("one ")
            await anext(response.aiter_lines())
        await let_go(turn)


async def test_hanging_up_before_the_answer_reaches_the_model() -> None:
    """So it is for `/v1/complete`, of which nothing has come yet."""
    model = Model()
    async with running_server(model) as server, nginx(server.port) as proxy, http(proxy) as client:
        asked = asyncio.ensure_future(client.post("/v1/complete", content=BODY))
        turn = await model.turn()
        asked.cancel()
        await asyncio.wait([asked])
        await let_go(turn)


async def let_go(turn: Turn) -> None:
    """Return once the server has closed its model call, which has to be soon."""
    async with asyncio.timeout(PATIENCE_S):
        await turn.closed.wait()


async def test_an_idle_websocket_lives_on_the_servers_pings() -> None:
    """nginx cuts a connection on which nothing comes for its read timeout; the pings keep it open."""
    short = {"proxy_read_timeout 35s": "proxy_read_timeout 2s"}
    async with running_server(echo, ping_interval_s=0.3) as server, nginx(server.port, replacing=short) as proxy:
        async with attached(proxy) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(4):
                    await client.socket.recv()
            assert await client.answer("still here") == "still here"


async def test_an_idle_websocket_without_pings_is_cut() -> None:
    """The control of the test before: without pings the read timeout ends it."""
    short = {"proxy_read_timeout 35s": "proxy_read_timeout 2s"}
    async with running_server(echo, ping_interval_s=30) as server, nginx(server.port, replacing=short) as proxy:
        async with asyncio.timeout(PATIENCE_S), attached(proxy) as client:
            assert await client.until_closed() == 1006


# --------------------------------------------------------------------------------------------------------- limits


async def test_half_sent_requests_are_cut_after_ten_seconds() -> None:
    """A head that doesn't come, one that comes by the byte, and a body that doesn't: none reaches the instance."""
    started = asyncio.get_running_loop().time()
    post = b"POST /v1/complete HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    async with Upstream() as upstream, nginx(upstream.port) as proxy:
        answers = await asyncio.gather(
            answer_to(proxy, b"GET / HTTP/1.1\r\nHost: loc"),
            answer_to(proxy, b"GET / HTTP/1.1\r\nHost: loc", then=b"a"),
            answer_to(proxy, post),
        )
        took_s = asyncio.get_running_loop().time() - started
        assert HEAD_TIMEOUT_S - 1 < took_s < HEAD_TIMEOUT_S + 4
        assert all(answer == b"" or answer.startswith(b"HTTP/1.1 408") for answer in answers), answers
        assert upstream.requests == []


async def test_a_body_over_the_limit_is_refused() -> None:
    """With 413, in the shape of the server's errors, and without the instance's having seen it."""
    limit = Settings().max_body_bytes
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        assert (await client.post("/v1/complete", content=b"x" * limit)).status_code == 200
        response = await client.post("/v1/complete", content=b"x" * (limit + 1))
        assert (response.status_code, response.headers["content-type"]) == (413, "application/json")
        assert response.json()["error"]["code"] == "body_too_large"
        assert len(upstream.requests) == 1


async def test_too_many_requests_get_429() -> None:
    """Beyond the rate and the burst; probes are not counted."""
    few = {"rate=100r/s": "rate=1r/m", "burst=2000": "burst=3"}
    async with Upstream() as upstream, nginx(upstream.port, replacing=few) as proxy, http(proxy) as client:
        for path in ("/healthz", "/readyz"):
            assert [(await client.get(path)).status_code for _ in range(10)] == [200] * 10
        answers = [await client.get("/") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert answers[-1].headers["retry-after"] == "1"
        assert answers[-1].json()["error"]["type"] == "rate_limit_error"
        assert (await client.get("/healthz")).status_code == 200
        await proxy.logged('"status":429', times=2)


async def test_too_many_connections_get_429() -> None:
    """Those that are there stay."""
    few = {"limit_conn connections 2000": "limit_conn connections 2"}
    async with running_server(echo) as server, nginx(server.port, replacing=few) as proxy:
        async with attached(proxy) as one, attached(proxy):
            with pytest.raises(InvalidStatus) as refused:
                async with attached(proxy):
                    pass
            assert (refused.value.response.status_code, refused.value.response.headers["retry-after"]) == (429, "1")
            assert await one.answer("hello") == "hello"
        await proxy.logged('"status":101', times=2)
        async with attached(proxy):
            pass


async def test_figures_and_administration_are_not_for_the_public() -> None:
    """`/metrics` and `/v1/admin/` are for this machine alone."""
    async with Upstream() as upstream, nginx(upstream.port) as proxy:
        async with http(proxy) as inside:
            assert (await inside.get("/metrics")).status_code == 200
            assert (await inside.post("/v1/admin/revoke")).status_code == 200
        async with http(proxy, transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2")) as outside:
            for path in ("/metrics", "/%6Detrics", "/metrics?x=1", "/v1/admin/revoke", "/v1/x/..%2Fadmin/revoke"):
                assert (await outside.get(path)).status_code == 403
                assert (await outside.post(path)).status_code == 403
            assert (await outside.get("/healthz")).status_code == 200
        assert [request.target for request in upstream.requests] == ["/metrics", "/v1/admin/revoke", "/healthz"]


# ------------------------------------------------------------------------------------- what is passed on, and logged


async def test_made_up_addresses_are_replaced() -> None:
    """Whatever a client says of its own address, the instance is told the one that nginx has seen."""
    lies = {"X-Forwarded-For": "8.8.8.8", "X-Real-IP": "8.8.8.8", "Forwarded": "for=8.8.8.8"}
    lies |= {"X-Forwarded-Proto": "https"}
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        await client.get("/", headers=lies)
        told = upstream.requests[-1].headers
        assert told["x-forwarded-for"] == "127.0.0.1"
        assert told["x-forwarded-proto"] == "http"
        assert "8.8.8.8" not in str(told)


async def test_the_client_arrives_and_its_words_do_not() -> None:
    """The server behind nginx counts the address that nginx has seen, over HTTP and at an upgrade."""
    lies = {"X-Forwarded-For": "8.8.8.8", "X-Forwarded-Proto": "https", "Forwarded": "for=8.8.8.8"}
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    away = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with telling_server() as port, nginx(port) as proxy, http(proxy, transport=away) as client:
        for headers, scheme in ((lies, "http"), (lies | upgrade, "ws")):
            told = (await client.get("/v1/realtime", headers=headers)).json()
            assert (told["client"], told["scheme"]) == ("127.0.0.2", scheme)


async def test_a_proxy_that_is_not_trusted_is_the_client() -> None:
    """The control of the test before."""
    away = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with telling_server(trusted_proxies=()) as port, nginx(port) as proxy, http(proxy, transport=away) as client:
        assert (await client.get("/v1/x")).json()["client"] == "127.0.0.1"


async def test_the_host_is_kept_with_its_port() -> None:
    """The server compares it with a page's origin."""
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        await client.get("/", headers={"Host": "chat.example.org:8443"})
        assert upstream.requests[-1].headers["host"] == "chat.example.org:8443"


async def test_the_page_behind_nginx_may_use_the_server_and_others_may_not() -> None:
    """The origin of the page is nginx's own address."""
    async with running_server(echo) as server, nginx(server.port) as proxy, http(proxy) as client:
        assert (await client.get("/")).status_code == 200
        for origin, status in ((proxy.url, 200), ("http://127.0.0.1", 403), ("https://example.org", 403)):
            response = await client.post("/v1/complete", content=BODY, headers={"Origin": origin})
            assert response.status_code == status, origin


async def test_each_request_has_a_name_of_its_own() -> None:
    """It is the client's, or else nginx's, and the same for each instance that is tried."""
    async with refusing() as draining, Upstream() as other, nginx(draining.port, other.port) as proxy:
        async with http(proxy) as client:
            for _ in range(4):
                await client.post("/v1/sessions")
            names = [request.headers["idempotency-key"] for request in other.requests]
            await client.post("/v1/sessions", headers={"Idempotency-Key": "mine"})
            assert other.requests[-1].headers["idempotency-key"] == "mine"
        assert len(set(names)) == 4
        assert draining.requests
        assert {request.headers["idempotency-key"] for request in draining.requests} <= {*names, "mine"}
        assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in names)


async def test_only_websockets_are_upgraded() -> None:
    """Other protocols that a client would like to change to are not passed on."""
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        await client.get("/", headers={"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"})
        assert "upgrade" not in upstream.requests[-1].headers
        assert "connection" not in upstream.requests[-1].headers


async def test_plain_requests_share_a_connection_to_the_instance() -> None:
    """It is kept for the next request, and a WebSocket has its own."""
    async with running_server(echo) as server, nginx(server.port) as proxy, http(proxy) as client:
        for _ in range(3):
            assert (await client.post("/v1/complete", content=BODY)).status_code == 200
            async with attached(proxy) as socket:
                assert await socket.answer("hello") == "hello"


async def test_logs_hold_no_query_no_referer_and_no_ids() -> None:
    """Not of requests that go well, nor of those for which no instance is there, nor of those that are refused."""
    few = {"burst=2000": "burst=10", "rate=100r/s": "rate=1r/m"}
    headers = {"Referer": f"https://example.org/{CANARY}", "User-Agent": CANARY, "Authorization": f"Bearer {CANARY}"}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(echo))
        dying = await stack.enter_async_context(Dying())
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=30))
        for port in (server.port, dying.port, free_port()):
            proxy = await stack.enter_async_context(nginx(port, replacing=few))
            for path in ("/v1/realtime", f"/v1/sessions/{CANARY}/events", f"/v1/tasks/{CANARY}", "/v1/complete"):
                for method in ("GET", "POST"):
                    await client.request(
                        method, f"{proxy.url}{path}?session_id={CANARY}", headers=headers, content=CANARY
                    )
            for _ in range(10):
                await client.get(f"{proxy.url}/?session_id={CANARY}", headers=headers)
            await proxy.logged('"status":429')
            assert CANARY not in "\n".join([*proxy.access_log, *proxy.error_log])
            paths = {json.loads(line)["path"] for line in proxy.access_log}
            assert paths == {"/", "/v1/realtime", "/v1/complete", "/v1/sessions/-/events", "/v1/tasks/-"}


async def test_what_goes_wrong_in_nginx_itself_is_not_told_with_the_request() -> None:
    """A file that can't be written is among the worst that it logs, and would come with the request's first line."""
    async with Upstream() as upstream, nginx(upstream.port) as proxy, http(proxy) as client:
        proxy.take_its_files()
        path = f"/v1/sessions/{CANARY}/events?token={CANARY}"
        assert (await client.post(path, content=b"x" * 500_000)).status_code == 500
        await proxy.logged('"status":500')
        assert CANARY not in "\n".join([*proxy.access_log, *proxy.error_log])


async def test_a_line_of_the_log_says_what_became_of_a_request() -> None:
    """One line of JSON each, with the instances that were tried."""
    port = free_port()
    async with Upstream() as upstream, nginx(port, upstream.port) as proxy, http(proxy) as client:
        for _ in range(3):
            await client.get("/a%22b%0A%7D?x=1")
        line = json.loads(await proxy.logged(f"127.0.0.1:{port}"))
        assert (line["status"], line["path"], line["client"]) == (200, '/a"b\n}', "127.0.0.1")
        assert line["tried"] == f"127.0.0.1:{port}, 127.0.0.1:{upstream.port}"
        assert line["said"] == "502, 200"


# ------------------------------------------------------------------------------------------------------------ TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A folder with a certificate for 127.0.0.1 that nobody else trusts, and its key."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    words += " -addext subjectAltName=IP:127.0.0.1 -keyout privkey.pem -out fullchain.pem"
    subprocess.run([program("openssl"), *words.split()], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


async def test_tls_as_the_comments_show_it(certificate: Path) -> None:
    """Without the marks it serves WebSockets, pages and HTTP/2 over TLS, and sends those who come without it there."""
    port, plain_port = free_port(), free_port()
    changes = {
        "#tls ": "",
        " listen 8443 ": f" listen 127.0.0.1:{port} ",
        " listen 8081 ": f" listen 127.0.0.1:{plain_port} ",
        "/etc/nginx/tls/": f"{certificate}/",
    }
    trust = ssl.create_default_context(cafile=str(certificate / "fullchain.pem"))
    async with running_server(echo) as server, nginx(server.port, replacing=changes) as proxy:
        async with connect(f"wss://127.0.0.1:{port}/v1/realtime", ssl=trust, proxy=None) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
        async with httpx.AsyncClient(verify=trust, trust_env=False) as client:
            origin = f"https://127.0.0.1:{port}"
            answer = await client.post(f"{origin}/v1/complete", content=BODY, headers={"Origin": origin})
            assert answer.status_code == 200
            assert answer.headers.get_list("strict-transport-security") == ["max-age=31536000"]
            assert (await client.post(f"{origin}/", content=BODY, headers={"Origin": proxy.url})).status_code == 403
            sent_on = await client.get(f"http://127.0.0.1:{plain_port}/page?x=1")
            assert (sent_on.status_code, sent_on.headers["location"]) == (308, "https://127.0.0.1/page?x=1")
        assert await agreed_on(port, trust) == ("h2", "TLSv1.3")


async def agreed_on(port: int, trust: ssl.SSLContext) -> tuple[str | None, str | None]:
    """The protocols that a client which knows the newest is offered."""
    trust.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust)
    connection = writer.get_extra_info("ssl_object")
    found = connection.selected_alpn_protocol(), connection.version()
    writer.transport.abort()
    await asyncio.sleep(0)
    return found
