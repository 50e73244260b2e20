from tests.support.server import running_server
from tests.support.client import attached

async def hello(request):
    for w in ["a","b","c"]: yield w

async def test_x():
    async with running_server(hello) as server:
        async with attached(server) as c:
            assert await c.answer("hi") == "abc"
        async with attached(server, c.session_id) as d:
            await d.until("response.done")
            assert d.transcript.texts == c.transcript.texts
        async with attached(server, subprotocol="realtime.v1.msgpack") as c:
            assert await c.answer("hi") == "abc"
