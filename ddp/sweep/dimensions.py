"""One dimension of a search: a job-file key with a range or a list of choices, its scale, and when it counts.

Ranges are arithmetic here; Optuna draws from them (`space`). A choice is kept as its TOML text, so that any value of a
job file can be one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["float", "int", "choice"]
LOG_BY_DEFAULT = ("learning_rate", "weight_decay", "sam_rho", "epsilon")  # the last part of a key ends with one
BORDER = 0.05  # of a range's width: nearer to an end than that is on the border


@dataclass(frozen=True, slots=True)
class Dimension:
    """A job-file key that trials differ in.

    Attributes:
        key: for example "optimizer.learning_rate".
        low, high: ends of the range, both included; of "float" and "int".
        log: whether equal factors are as likely, not equal differences.
        choices: of "choice", as TOML text.
        points: values that a grid takes of a range.
        when: values, as TOML text, of other keys under which this one is searched at all; left to the job otherwise.
    """

    key: str
    kind: Kind
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    choices: tuple[str, ...] = ()
    points: int = 5
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_ordered(self) -> bool:
        """Whether it has borders: a range, or numbers to choose from."""
        return self.kind != "choice" or all(is_number(toml_to_value(text)) for text in self.choices)

    def grid(self) -> list[Any]:
        """Values for a grid: the choices, or `points` of the range by its scale, both ends among them."""
        if self.kind == "choice":
            return [toml_to_value(text) for text in self.choices]
        if self.points == 1 or self.low == self.high:
            return [self.at(0.5)]
        values = [self.at(index / (self.points - 1)) for index in range(self.points)]
        return list(dict.fromkeys(values))

    def at(self, share: float) -> Any:
        """The value so far from low (0) to high (1), by its scale."""
        if share in (0.0, 1.0):  # exactly the end, whatever exp and log round to
            value = self.high if share else self.low
        else:
            value = self._from_scale(self._to_scale(self.low) * (1 - share) + self._to_scale(self.high) * share)
        return round(value) if self.kind == "int" else value

    def share(self, value: Any) -> float:
        """Where `value` lies from low (0) to high (1), by its scale; of choices that are numbers by their order."""
        if self.kind == "choice":
            ordered = sorted(toml_to_value(text) for text in self.choices)
            return ordered.index(value) / (len(ordered) - 1) if len(ordered) > 1 and value in ordered else 0.5
        low, high = self._to_scale(self.low), self._to_scale(self.high)
        return (self._to_scale(value) - low) / (high - low) if high > low else 0.5

    def border(self, value: Any) -> Literal["lower", "upper"] | None:
        """The end of the range that `value` lies at, None inside; always None where there is no order."""
        if not self.is_ordered:
            return None
        share = self.share(value)
        return "lower" if share <= BORDER else "upper" if share >= 1 - BORDER else None

    def beyond(self, end: Literal["lower", "upper"]) -> Any:
        """The nearest value outside of the range; of a list of whole numbers one as far out as the list goes on.

        Only the nearest says whether there is anything beyond: a longer step would leave what a job takes, too.
        """
        if self.kind == "int":
            return round(self.low) - 1 if end == "lower" else round(self.high) + 1
        if self.kind == "float":
            return math.nextafter(self.low, -math.inf) if end == "lower" else math.nextafter(self.high, math.inf)
        ordered = sorted((toml_to_value(text) for text in self.choices), reverse=end == "upper")
        last, before = ordered[:2]
        if not all(isinstance(value, int) for value in ordered):
            return math.nextafter(last, -math.inf if end == "lower" else math.inf)
        if end == "upper" or last <= 0:
            return 2 * last - before
        return max(min(1, last - 1), last * last // before)

    def narrowed(self, whole: Dimension, around: Any, to_share: float) -> Dimension:
        """A range `to_share` times as wide by its scale with `around` in the middle, cut where `whole` ends."""
        if self.kind == "choice":
            return self
        half = to_share * (self._to_scale(self.high) - self._to_scale(self.low)) / 2
        middle = self._to_scale(around)
        low, high = self._from_scale(middle - half), self._from_scale(middle + half)
        if self.kind == "int":
            low, high = min(math.floor(low), around), max(math.ceil(high), around)
        return replace(self, low=max(whole.low, min(low, around)), high=min(whole.high, max(high, around)))

    def text(self) -> str:
        """For a person: `0.001 to 0.1, log`."""
        if self.kind == "choice":
            return " | ".join(text.strip('"') for text in self.choices)
        return f"{self.low:.4g} to {self.high:.4g}{', log' if self.log else ''}"

    def _to_scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _from_scale(self, value: float) -> float:
        return math.exp(value) if self.log else value


def is_log_by_default(key: str) -> bool:
    """Rates and weight decay are searched by factors; dropout, momentum and sizes are not."""
    return key.rpartition(".")[2].endswith(LOG_BY_DEFAULT)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_same(one: object, other: object) -> bool:
    """As a job takes them: 0 and 0.0 are, 1 and true are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def value_to_toml(value: Any) -> str:
    """The text of a number, word, truth value or list of those that `--set` reads back as the same."""
    return json.dumps(value)


def toml_to_value(text: str) -> Any:
    """What `value_to_toml` made, as it was."""
    return json.loads(text)


def override(key: str, value: Any) -> str:
    """`key=value` as `--set` takes it."""
    return f"{key}={value_to_toml(value)}"


def shown(value: Any) -> str:
    """A value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else value_to_toml(value)
