"""What tokens cost and weigh."""

from __future__ import annotations

import pytest

from realtime.access.prices import parse_prices, weighted_tokens
from realtime.protocol import Usage
from realtime.settings import SettingsError

MILLION = 1_000_000


def usage(input_tokens: int = 0, output_tokens: int = 0, read: int | None = None, write: int | None = None) -> Usage:
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=input_tokens + output_tokens + (read or 0) + (write or 0),
        estimated=False,
        cache_read_input_tokens=read,
        cache_creation_input_tokens=write,
    )


def test_input_and_output_have_their_prices() -> None:
    """In dollars for a million tokens."""
    assert parse_prices(("claude-x=1/5",)).cost_usd("claude-x", usage(MILLION, 2 * MILLION)) == 11.0


def test_cached_input_is_a_share_of_input_if_nothing_else_is_said() -> None:
    """A tenth for what is read, a quarter more for what is written."""
    prices = parse_prices(("claude-x=2/5",))
    assert prices.cost_usd("claude-x", usage(read=MILLION)) == 0.2
    assert prices.cost_usd("claude-x", usage(write=MILLION)) == 2.5


@pytest.mark.parametrize(("text", "read", "write"), [("m=1/5/0.25", 0.25, 1.25), ("m=1/5/0.25/2", 0.25, 2.0)])
def test_cached_input_may_have_prices_of_its_own(text: str, read: float, write: float) -> None:
    """The third number and the fourth."""
    prices = parse_prices((text,))
    assert prices.cost_usd("m", usage(read=MILLION)) == read
    assert prices.cost_usd("m", usage(write=MILLION)) == write


def test_the_star_is_for_all_that_are_not_named() -> None:
    """Whatever the order."""
    prices = parse_prices(("*=3/15", "claude-x=1/5"))
    assert prices.cost_usd("claude-x", usage(MILLION)) == 1.0
    assert prices.cost_usd("claude-y", usage(MILLION)) == 3.0


def test_a_cost_that_nobody_knows_is_none() -> None:
    """Not 0: that would be a price."""
    assert parse_prices(("claude-x=1/5",)).cost_usd("claude-y", usage(1)) is None
    assert parse_prices(()).cost_usd("claude-y", usage(1)) is None
    assert parse_prices(("free=0/0",)).cost_usd("free", usage(1)) == 0.0


def test_a_few_tokens_cost_something() -> None:
    """A cost is not rounded to nothing, and has no tail of a float's."""
    prices = parse_prices(("m=0.1/0.3",))
    assert prices.cost_usd("m", usage(1)) == 1e-7
    assert prices.cost_usd("m", usage(0, 3)) == 9e-7


def test_a_model_s_name_may_hold_anything() -> None:
    """The last equals sign ends it."""
    assert parse_prices(("org/model=v2=1/5",)).cost_usd("org/model=v2", usage(MILLION)) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "m=",
        "=1/5",
        "m=1",
        "m=1/",
        "m=-1/5",
        "m=1/5/1/1/1",
        "m=one/5",
        "m=nan/5",
        "m=1e3/5",
        "m=1/5\n",
        "m=1 / 5",
    ],
)
def test_what_is_no_price_is_said_in_one_line(text: str) -> None:
    """With the text itself and an example."""
    with pytest.raises(SettingsError) as error:
        parse_prices((text,))
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_has_one_price() -> None:
    """Nobody could say which of two holds."""
    with pytest.raises(SettingsError, match="one price too many"):
        parse_prices(("m=1/5", "m=2/5"))


@pytest.mark.parametrize(
    ("used", "weight"),
    [
        (usage(), 0),
        (usage(3, 4), 7),
        (usage(3, 4, read=10), 8),
        (usage(3, 4, read=1), 8),
        (usage(3, 4, write=4), 12),
        (usage(3, 4, write=1), 9),
        (usage(0, 0, read=5, write=2), 3),
        (usage(10**12, 1, read=10**13), 2 * 10**12 + 1),
    ],
)
def test_a_budget_is_charged_cached_tokens_at_their_share(used: Usage, weight: int) -> None:
    """Rounded up, exactly."""
    assert weighted_tokens(used) == weight
