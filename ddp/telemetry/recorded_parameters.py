"""The table of chosen parameters, read back for drawing: a few entries of a few parameters over the run."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from ddp.telemetry.record_values import number, whole

MOST_PARAMETERS = 6
MOST_ENTRIES = 8  # of each
MOST_STEPS = 400  # more would only make the page heavy

CHOSEN_STEPS = """
SELECT step, epoch FROM (
    SELECT step, epoch, row_number() OVER (ORDER BY step) AS place, count(*) OVER () AS count
    FROM (SELECT DISTINCT step FROM parameter_values) JOIN steps USING (step))
WHERE place % max(1, count / ?) = 0 OR place = 1 ORDER BY step
"""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One entry of a parameter over the run."""

    parameter: str
    place: int  # in the flattened parameter
    epochs: tuple[float, ...]
    values: tuple[float, ...]
    gradients: tuple[float, ...]


def read_trajectories(database: sqlite3.Connection) -> list[Trajectory]:
    """Of the first parameters, evenly spread entries at evenly spread steps, in the order in which they were recorded."""
    epochs = {whole(step): number(epoch) for step, epoch in database.execute(CHOSEN_STEPS, (MOST_STEPS,))}
    return [
        _trajectory(database, epochs, entry, parameter, place)
        for parameter, entries in _chosen_entries(database).items()
        for entry, place in entries
    ]


def _chosen_entries(database: sqlite3.Connection) -> dict[str, list[tuple[int, int]]]:
    """For each parameter the numbers of its entries, and their places."""
    found: dict[str, list[tuple[int, int]]] = {}
    rows = database.execute('SELECT id, name, subname, "index" FROM parameter_entries ORDER BY id')
    for entry, module, name, place in rows:
        found.setdefault(f"{module}.{name}".removeprefix("."), []).append((whole(entry), whole(place)))
    return {
        parameter: [
            entries[i * len(entries) // min(len(entries), MOST_ENTRIES)] for i in range(min(len(entries), MOST_ENTRIES))
        ]
        for parameter, entries in list(found.items())[:MOST_PARAMETERS]
    }


def _trajectory(
    database: sqlite3.Connection, epochs: dict[int, float], entry: int, parameter: str, place: int
) -> Trajectory:
    query = "SELECT step, value, gradient FROM parameter_values WHERE entry = ? ORDER BY step"
    rows = [row for row in database.execute(query, (entry,)) if row["step"] in epochs]
    return Trajectory(
        parameter,
        place,
        tuple(epochs[row["step"]] for row in rows),
        tuple(number(row["value"]) for row in rows),
        tuple(number(row["gradient"]) for row in rows),
    )
