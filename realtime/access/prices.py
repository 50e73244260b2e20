"""What a model's tokens cost, and what they weigh in a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from realtime.protocol import Usage
from realtime.settings import SettingsError

CACHE_READ_SHARE, CACHE_WRITE_SHARE = 0.1, 1.25
"""What reading from the provider's cache costs, and writing to it for five minutes, of what input costs: the
multipliers of "Prompt caching" in Anthropic's documentation."""
ANY = "*"
"""The model whose price is that of all that have none of their own."""
COST_DIGITS = 9
"""Costs are told to the billionth of a dollar."""
_UNIT = 20
_CACHE_READ_UNITS, _CACHE_WRITE_UNITS = round(_UNIT * CACHE_READ_SHARE), round(_UNIT * CACHE_WRITE_SHARE)
"""The shares in twentieths, so that weights are exact."""


class Price(Struct, frozen=True):
    """Dollars for a million tokens."""

    input: float
    output: float
    cache_read: float
    cache_write: float


class Prices:
    """The prices of models, by their names."""

    def __init__(self, by_model: Mapping[str, Price]) -> None:
        self._by_model = by_model

    def priced(self, model: str, usage: Usage) -> Usage:
        """A use with what it cost, where that is known."""
        return replace(usage, cost_usd=self.cost_usd(model, usage))

    def cost_usd(self, model: str, usage: Usage) -> float | None:
        """What a use of a model cost, in dollars, to the billionth; `None` where its price is not known."""
        price = self._by_model.get(model) or self._by_model.get(ANY)
        if price is None:
            return None
        millionths = (
            usage.input_tokens * price.input
            + usage.output_tokens * price.output
            + (usage.cache_read_input_tokens or 0) * price.cache_read
            + (usage.cache_creation_input_tokens or 0) * price.cache_write
        )
        return round(millionths / 1e6, COST_DIGITS)


UNKNOWN = Prices({})
"""No prices at all."""


def parse_prices(texts: Sequence[str]) -> Prices:
    """The prices that a setting tells, each as `model=input/output[/cache read[/cache write]]`, in dollars for a
    million tokens. Raises `SettingsError` with one line."""
    by_model: dict[str, Price] = {}
    for text in texts:
        model, price = _parse_price(text)
        if model in by_model:
            raise SettingsError(f"{text!r} is one price too many: {model} has one already")
        by_model[model] = price
    return Prices(by_model)


def weighted_tokens(usage: Usage) -> int:
    """What a budget is charged for a use: its tokens, cached ones at their share of the price, rounded up."""
    cached_units = (usage.cache_read_input_tokens or 0) * _CACHE_READ_UNITS
    cached_units += (usage.cache_creation_input_tokens or 0) * _CACHE_WRITE_UNITS
    return usage.input_tokens + usage.output_tokens - (-cached_units // _UNIT)


def _parse_price(text: str) -> tuple[str, Price]:
    model, _, numbers = text.rpartition("=")
    if not model or not re.fullmatch(r"\d{1,9}(\.\d{1,9})?(/\d{1,9}(\.\d{1,9})?){1,3}", numbers, re.ASCII):
        raise SettingsError(f"{text!r} is no price: expected for example claude-x=1/5, dollars for a million tokens")
    given = [float(number) for number in numbers.split("/")]
    usual = [given[0] * CACHE_READ_SHARE, given[0] * CACHE_WRITE_SHARE]
    return model.strip(), Price(*given, *usual[len(given) - 2 :])
