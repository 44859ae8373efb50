"""What an ensemble came to: a line for each member, the ensemble, and what was made of it; in words and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddp.ensemble.joint import Measured
from ddp.tasks.base import Goal


@dataclass(frozen=True, slots=True)
class Row:
    """One network, or several as one."""

    name: str
    measured: Measured


@dataclass(frozen=True, slots=True)
class Findings:
    """The same on all ranks.

    Attributes:
        goals: the direction in which each metric gets better.
        combined: how predictions are: "probabilities" or "outputs".
        weights: of the members, with the sum 1.
        soup: the network with the members' mean weights, where asked for.
        student: the network that was distilled, where asked for.
    """

    split: str
    examples: int
    world_size: int
    goals: Mapping[str, Goal]
    combined: str
    weights: Sequence[float]
    members: Sequence[Row]
    ensemble: Row
    soup: Row | None = None
    student: Row | None = None

    @property
    def rows(self) -> list[Row]:
        extra = [each for each in (self.soup, self.student) if each is not None]
        return [*self.members, self.mean, self.ensemble, *extra]

    @property
    def mean(self) -> Row:
        """Of the members' own values, to hold the ensemble beside."""
        count, measured = len(self.members), [each.measured for each in self.members]
        metrics = {name: sum(each.metrics[name] for each in measured) / count for name in self.goals}
        return Row("mean of members", Measured(sum(each.loss for each in measured) / count, metrics))


def in_words(found: Findings) -> str:
    """A heading, a table, and how the predictions were combined."""
    names = list(found.goals)
    rows = [(row.name, *(f"{value:.5g}" for value in _values(row, names))) for row in found.rows]
    cells = [("", "loss", *names), *rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names) + 2)]
    table = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    heading = f"{found.split}: {found.examples:,} examples, {len(found.members)} members, {found.world_size} rank(s)"
    return "\n".join([heading, *table, _combined(found)])


def to_json(found: Findings) -> dict[str, Any]:
    """Plain values; a number that is not finite as its name."""

    def plain(row: Row | None) -> dict[str, Any] | None:
        if row is None:
            return None
        values = {"loss": row.measured.loss, **row.measured.metrics}
        return {
            "name": row.name,
            **{key: value if math.isfinite(value) else str(value) for key, value in values.items()},
        }

    return {
        "split": found.split,
        "examples": found.examples,
        "world_size": found.world_size,
        "combined": found.combined,
        "weights": list(found.weights),
        "members": [plain(each) for each in found.members],
        "mean_of_members": plain(found.mean),
        "ensemble": plain(found.ensemble),
        "averaged_weights": plain(found.soup),
        "student": plain(found.student),
    }


def _values(row: Row, names: Sequence[str]) -> list[float]:
    return [row.measured.loss, *(row.measured.metrics[name] for name in names)]


def _combined(found: Findings) -> str:
    if found.combined == "probabilities":
        return "The ensemble predicts the mean of its members' probabilities."
    return (
        "The ensemble predicts the mean of its members' outputs: the task has no class_dimension. Where its model gives "
        "logits, let the task say along which dimension, for the mean of probabilities."
    )
