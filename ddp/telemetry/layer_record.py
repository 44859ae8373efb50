"""The layers' statistics in `run.db`: their tables, and how a look is written and read back.

`layers` has a row for each layer of each look. A histogram is a row of `layer_histograms`, its counts as JSON from the first
bin that is not empty on, which SQLite's `json_each` takes apart; edges are powers of two, see `ddp.watching.histogram`. Of the
first layer's weights the first look's and the latest one's are kept.
"""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import fields

from ddp.telemetry.record_values import number, whole
from ddp.telemetry.records import LayersRecord
from ddp.watching.histogram import Histogram, bins
from ddp.watching.layers import LayerStatistics, WeightPictures

HISTOGRAMS_SPACING = 200  # a look's histograms are kept at most this share of the run's steps apart: 1/200
WHAT = ("activations", "gradients")
COLUMNS = tuple(field.name for field in fields(LayerStatistics) if field.name not in WHAT)
TABLES = ("looks", "layers", "layer_histograms", "first_layer_weights")

LAYER_SCHEMA = """
CREATE TABLE IF NOT EXISTS looks (step INTEGER PRIMARY KEY, unix_time REAL, cost_seconds REAL);
CREATE TABLE IF NOT EXISTS layers (
    step INTEGER NOT NULL, place INTEGER NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, after TEXT NOT NULL,
    is_output INTEGER NOT NULL, weight_norm REAL, update_norm REAL, gradient_norm REAL, update_ratio REAL,
    activation_mean REAL, activation_std REAL, units INTEGER NOT NULL, dead_units INTEGER NOT NULL,
    saturated_units INTEGER NOT NULL, examples INTEGER NOT NULL, PRIMARY KEY (step, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS layer_histograms (
    step INTEGER NOT NULL, place INTEGER NOT NULL, what TEXT NOT NULL, bins_per_octave INTEGER NOT NULL,
    first_bin INTEGER NOT NULL, counts TEXT NOT NULL, not_finite INTEGER NOT NULL,
    PRIMARY KEY (step, place, what)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS first_layer_weights (
    step INTEGER PRIMARY KEY, layer TEXT NOT NULL, pictures INTEGER NOT NULL, channels INTEGER NOT NULL,
    height INTEGER NOT NULL, width INTEGER NOT NULL, total INTEGER NOT NULL, weights BLOB NOT NULL);
"""


def write_layers(database: sqlite3.Connection, record: LayersRecord) -> None:
    """Inside a transaction of the caller's."""
    step = record.step
    database.execute("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", (step, record.unix_time, record.cost_seconds))
    names = (*COLUMNS, "update_ratio")
    rows = [(step, place, *(getattr(each, name) for name in names)) for place, each in enumerate(record.layers)]
    places = ", ".join("?" * (len(names) + 2))
    database.executemany(f"INSERT OR REPLACE INTO layers (step, place, {', '.join(names)}) VALUES ({places})", rows)
    if _takes_histograms(database, step):
        histograms = [
            (step, place, what, *_packed(histogram))
            for place, layer in enumerate(record.layers)
            for what in WHAT
            if (histogram := getattr(layer, what)) is not None
        ]
        database.executemany("INSERT OR REPLACE INTO layer_histograms VALUES (?, ?, ?, ?, ?, ?, ?)", histograms)
    if (pictures := record.pictures) is not None:
        between = "SELECT min(step) FROM first_layer_weights"
        database.execute(f"DELETE FROM first_layer_weights WHERE step > ({between})")
        values = (step, pictures.layer, *pictures.shape, pictures.total, pictures.values)
        database.execute("INSERT OR REPLACE INTO first_layer_weights VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def _takes_histograms(database: sqlite3.Connection, step: int) -> bool:
    (before,) = database.execute("SELECT max(step) FROM layer_histograms").fetchone()
    return before is None or (step - before) * HISTOGRAMS_SPACING >= step


def _packed(histogram: Histogram) -> tuple[int, int, str, int]:
    filled = [place for place, count in enumerate(histogram.counts) if count] or [0]
    counts = histogram.counts[filled[0] : filled[-1] + 1]
    return histogram.bins_per_octave, filled[0], json.dumps(counts, separators=(",", ":")), histogram.not_finite


def read_looks(database: sqlite3.Connection, most: int | None = None) -> list[LayersRecord]:
    """The looks in order of steps, each without pictures; histograms where they were kept.

    Args:
        most: of more looks than this so many are read, evenly spread, the first and the last among them.
    """
    steps = [step for (step,) in database.execute("SELECT step FROM looks ORDER BY step")]
    if most is not None and len(steps) > most:
        steps = sorted({steps[round(i * (len(steps) - 1) / max(most - 1, 1))] for i in range(most)})
    return [_look(database, step) for step in steps]


def _look(database: sqlite3.Connection, step: int) -> LayersRecord:
    histograms = {
        (row["place"], row["what"]): _unpacked(row)
        for row in database.execute("SELECT * FROM layer_histograms WHERE step = ?", (step,))
    }
    layers = tuple(
        _layer(row, histograms)
        for row in database.execute("SELECT * FROM layers WHERE step = ? ORDER BY place", (step,))
    )
    times = database.execute("SELECT unix_time, cost_seconds FROM looks WHERE step = ?", (step,)).fetchone()
    return LayersRecord(step, number(times[0]), layers, None, number(times[1]))


def _layer(row: sqlite3.Row, histograms: dict[tuple[int, str], Histogram]) -> LayerStatistics:
    place = row["place"]
    return LayerStatistics(
        *(str(row[name]) for name in ("name", "kind", "after")),
        is_output=bool(row["is_output"]),
        weight_norm=number(row["weight_norm"]),
        update_norm=number(row["update_norm"]),
        gradient_norm=number(row["gradient_norm"]),
        activations=histograms.get((place, "activations")),
        gradients=histograms.get((place, "gradients")),
        activation_mean=number(row["activation_mean"]),
        activation_std=number(row["activation_std"]),
        units=whole(row["units"]),
        dead_units=whole(row["dead_units"]),
        saturated_units=whole(row["saturated_units"]),
        examples=whole(row["examples"]),
    )


def _unpacked(row: sqlite3.Row) -> Histogram:
    bins_per_octave, first = whole(row["bins_per_octave"]), whole(row["first_bin"])
    if bins_per_octave not in (1, 2, 4):
        raise ValueError(f"{bins_per_octave} bins per octave are none of 1, 2, 4")
    counts = [whole(each) for each in json.loads(row["counts"])]
    rest = bins(bins_per_octave) - first - len(counts)
    if first < 0 or rest < 0:
        raise ValueError(f"a histogram of {len(counts)} bins from bin {first} on")
    return Histogram(bins_per_octave, (*(0,) * first, *counts, *(0,) * rest), whole(row["not_finite"]))


def read_pictures(database: sqlite3.Connection) -> list[tuple[int, WeightPictures]]:
    """The first layer's weights and the steps they are of: the first look's, and the latest one's."""
    found: list[tuple[int, WeightPictures]] = []
    for row in database.execute("SELECT * FROM first_layer_weights ORDER BY step"):
        shape = tuple(whole(row[name]) for name in ("pictures", "channels", "height", "width"))
        values = row["weights"]
        if not isinstance(values, bytes) or min(shape) < 1 or len(values) != 4 * math.prod(shape):
            raise ValueError(f"the first layer's weights do not have the shape {shape}")
        pictures = WeightPictures(
            str(row["layer"]), (shape[0], shape[1], shape[2], shape[3]), whole(row["total"]), values
        )
        found.append((whole(row["step"]), pictures))
    return found
