"""Which responder the settings and the environment mean."""

from __future__ import annotations

from typing import Any, Literal
from unittest import mock

import pytest

from realtime.responders import anthropic
from realtime.responders.choose import choose
from realtime.responders.demo import demo
from realtime.settings import Settings, SettingsError
from tests.responders import answer_of, asked
from tests.support.model_server import ModelServer

KEY = {"ANTHROPIC_API_KEY": "sk-test"}


@pytest.mark.parametrize("environ", [{}, {"ANTHROPIC_API_KEY": ""}], ids=["no key", "an empty key"])
def test_without_a_key_it_is_the_demo(environ: dict[str, str]) -> None:
    """The server starts on any machine, and its default model is named as what it is."""
    assert choose(Settings(), environ) == (demo, "demo")


def test_with_a_key_it_is_anthropic() -> None:
    """A key in the environment is all that is needed."""
    responder, model = choose(Settings(), KEY)
    assert isinstance(responder, anthropic.AnthropicResponder)
    assert model == anthropic.DEFAULT_MODEL


def test_demo_may_be_asked_for_though_there_is_a_key() -> None:
    """What the settings say counts for more than what the environment has."""
    assert choose(Settings(responder="demo"), KEY) == (demo, "demo")


@pytest.mark.parametrize("environ", [{}, {"ANTHROPIC_API_KEY": ""}], ids=["no key", "an empty key"])
def test_anthropic_without_a_key_is_refused_at_the_start(environ: dict[str, str]) -> None:
    """Not at the first response, and in one line that names both settings."""
    with pytest.raises(SettingsError) as raised:
        choose(Settings(responder="anthropic"), environ)
    assert "REALTIME_RESPONDER" in str(raised.value)
    assert "ANTHROPIC_API_KEY" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("thinking", "asks"), [("off", False), ("adaptive", True)])
def test_settings_reach_the_responder(thinking: Literal["off", "adaptive"], asks: bool) -> None:
    """Thinking, the time for retries and the pool's size are the settings'."""
    made: dict[str, Any] = {}
    with mock.patch.object(anthropic, "AnthropicResponder", lambda **options: made.update(options)):
        choose(Settings(thinking=thinking, upstream_retry_s=7, upstream_max_connections=5), KEY)
    assert made == {"thinking": asks, "retry_s": 7, "max_connections": 5}


async def test_chosen_responder_takes_its_key_and_address_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The SDK's own variables are all that has to be set."""
    async with ModelServer() as models:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-environment")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", models.url)
        responder, model = choose(Settings(responder="anthropic"))
        assert isinstance(responder, anthropic.AnthropicResponder)
        async with responder:
            await answer_of(responder, asked(model))
        sent = models.received[0]
        assert sent.headers["authorization"] == "Bearer sk-environment"
        assert sent.body["model"] == model
