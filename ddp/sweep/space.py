"""The space of a stage: its dimensions in an order in which conditions can be decided, and values of all of them.

A value is drawn by Optuna (`draw`), listed (`grid`), or put at an end of its range (`corners`, for checking a sweep before
it starts). Values are of the dimensions that count: one whose condition is not met is left to the job.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ddp.errors import UsageError
from ddp.sweep.dimensions import Dimension, is_same, toml_to_value, value_to_toml

Values = dict[str, Any]
MOST_GRID_POINTS = 10_000
MOST_COMBINATIONS = 64  # of choices whose corners are looked at


class Draws(Protocol):
    """What is used of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = ...) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = ...) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Space:
    """Dimensions that vary, and the values that the others keep.

    Attributes:
        dimensions: all of the sweep, conditions after what they depend on.
        varied: the keys that vary; the others keep their value of `fixed`, or the job's.
        fixed: values found in earlier stages.
        job_value: the job's own value of a key, for conditions.
    """

    dimensions: tuple[Dimension, ...]
    varied: frozenset[str]
    fixed: Values = field(default_factory=dict)
    job_value: Callable[[str], Any] = lambda key: None

    def draw(self, trial: Draws) -> Values:
        """One value of each dimension that counts, the varied ones as Optuna wants them."""
        return self._fill(lambda dimension: _drawn(trial, dimension))

    def fill(self, chosen: Callable[[Dimension], Any]) -> Values:
        """Likewise, the varied ones by `chosen`."""
        return self._fill(chosen)

    def grid(self) -> list[Values]:
        """All combinations of each dimension's `grid`, each once however conditions fall.

        Raises:
            UsageError: there are more than anybody would run.
        """
        found = list(itertools.islice(self._branches(0, {}), MOST_GRID_POINTS + 1))
        if len(found) > MOST_GRID_POINTS:
            raise UsageError(
                f"sweep.sampler: the grid has more than {MOST_GRID_POINTS:,} points: give fewer values, smaller points, "
                "or another sampler"
            )
        return found

    def corners(self) -> Iterator[Values]:
        """Every combination of choices (of the first so many) with all ranges at an end, and with one at the other."""
        choices = [each for each in self.dimensions if each.kind == "choice" and each.key in self.varied]
        ranges = [each for each in self.dimensions if each.kind != "choice" and each.key in self.varied]
        seen: set[str] = set()
        combinations = itertools.product(*(each.choices for each in choices))
        every = [*itertools.islice(combinations, MOST_COMBINATIONS), *_each_choice_once(choices)]
        for combination in every:
            picked = dict(zip((each.key for each in choices), combination, strict=True))
            for base, other in ((0.0, 1.0), (1.0, 0.0)):
                for odd in (None, *(each.key for each in ranges)):
                    values = self._fill(_corner(picked, base, other, odd))
                    if (text := value_to_toml(values)) not in seen:
                        seen.add(text)
                        yield values

    def counts(self, dimension: Dimension, values: Values) -> bool:
        """Whether `dimension`'s condition is met by the `values` of those before it."""
        return all(
            any(is_same(values[key] if key in values else self.job_value(key), toml_to_value(text)) for text in allowed)
            for key, allowed in dimension.when.items()
        )

    def _fill(self, chosen: Callable[[Dimension], Any]) -> Values:
        values: Values = {}
        for dimension in self.dimensions:
            if not self.counts(dimension, values):
                continue
            if dimension.key in self.varied:
                values[dimension.key] = chosen(dimension)
            elif dimension.key in self.fixed:
                values[dimension.key] = self.fixed[dimension.key]
        return values

    def _branches(self, index: int, values: Values) -> Iterator[Values]:
        if index == len(self.dimensions):
            yield values
            return
        dimension = self.dimensions[index]
        if not self.counts(dimension, values):
            choices: list[Values] = [{}]
        elif dimension.key in self.varied:
            choices = [{dimension.key: value} for value in dimension.grid()]
        else:
            choices = [{dimension.key: self.fixed[dimension.key]} if dimension.key in self.fixed else {}]
        for choice in choices:
            yield from self._branches(index + 1, values | choice)


def in_order(dimensions: Mapping[str, Dimension]) -> tuple[Dimension, ...]:
    """Each after those that its condition names; otherwise as given.

    Raises:
        UsageError: conditions go in a circle.
    """
    placed: dict[str, Dimension] = {}
    waiting = dict(dimensions)
    while waiting:
        ready = [key for key, each in waiting.items() if not (each.when.keys() & waiting.keys())]
        if not ready:
            raise UsageError(f"sweep.dimensions: the conditions of {', '.join(waiting)} go in a circle")
        placed |= {key: waiting.pop(key) for key in ready}
    return tuple(placed.values())


def _drawn(trial: Draws, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return toml_to_value(trial.suggest_categorical(dimension.key, dimension.choices))
    if dimension.kind == "int":
        return trial.suggest_int(dimension.key, round(dimension.low), round(dimension.high), log=dimension.log)
    return trial.suggest_float(dimension.key, dimension.low, dimension.high, log=dimension.log)


def optuna_parameters(values: Values, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """`values` as Optuna knows them, for a trial whose values are given."""
    kinds = {each.key: each.kind for each in dimensions}
    return {key: value_to_toml(value) if kinds[key] == "choice" else value for key, value in values.items()}


def _each_choice_once(choices: Sequence[Dimension]) -> Iterator[tuple[str, ...]]:
    """Combinations in which every choice of every dimension is met, however many there are."""
    for place, dimension in enumerate(choices):
        for choice in dimension.choices:
            yield tuple(choice if index == place else each.choices[0] for index, each in enumerate(choices))


def _corner(picked: Mapping[str, str], base: float, other: float, odd: str | None) -> Callable[[Dimension], Any]:
    def chosen(dimension: Dimension) -> Any:
        if dimension.kind == "choice":
            return toml_to_value(picked[dimension.key])
        return dimension.at(other if dimension.key == odd else base)

    return chosen
