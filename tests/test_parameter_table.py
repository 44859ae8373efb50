"""The table of chosen parameters: against autograd in one process, alike at 1 to 4 ranks, over a resume."""

from __future__ import annotations

import itertools
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddp.errors import JobFileError, UsageError
from ddp.job import RecordSection, parse_job
from ddp.telemetry.gather import gather
from ddp.telemetry.records import ParametersRecord, Sink
from ddp.telemetry.sinks import Sinks
from ddp.training.parameter_table import ParameterTable, spread_places
from ranks import RankPool
from training_runs import job, train_ranks

PARAMETERS = ("0.weight", "*.bias")


class Kept(Sink):
    """A sink that keeps the records of parameters."""

    def __init__(self) -> None:
        self.records: list[ParametersRecord] = []

    def parameters(self, record: ParametersRecord) -> None:
        self.records.append(record)


def table(module: nn.Module, **settings: Any) -> tuple[ParameterTable, Kept, Sinks]:
    kept = Kept()
    section = RecordSection.model_validate({"parameters": ["*"], **settings})
    return ParameterTable(section, module), kept, Sinks([kept])


@pytest.mark.parametrize("count", [1, 2, 5, 31, 32, 33, 1000, 12_345_677])
@pytest.mark.parametrize("most", [1, 2, 3, 32])
def test_places_are_evenly_spread(count: int, most: int) -> None:
    places = spread_places(count, most)
    assert len(places) == min(count, most) == len(set(places))
    assert list(places) == sorted(places) and places[0] >= 0 and places[-1] < count
    if len(places) > 1:
        assert (places[0], places[-1]) == (0, count - 1)
        gaps = [after - before for before, after in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1


def test_values_and_gradients_are_those_before_the_update() -> None:
    first, second, third = nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Conv2d(2, 2, 3)
    module = nn.Sequential(first, second, third)
    third.weight.requires_grad_(False)
    observer, kept, sinks = table(module, parameters=["1.*", "2.weight", "0.bias"], max_entries=4)
    second(first(torch.ones(5, 4))).sum().backward()
    weight, gradient = second.weight.detach().clone(), second.weight.grad
    assert gradient is not None
    observer.before_forward(1)
    observer.before_update(1)
    with torch.no_grad():
        second.weight.add_(1.0)
    observer.after_update(1, sinks)
    (record,) = kept.records
    bias, taken, frozen = record.parameters  # in the model's order
    assert (bias.name, taken.name, frozen.name) == ("0.bias", "1.weight", "2.weight")
    assert (taken.shape, taken.places) == ((2, 3), (0, 2, 3, 5))
    assert taken.values == tuple(float(weight.flatten()[place]) for place in taken.places)
    assert taken.gradients == tuple(float(gradient.flatten()[place]) for place in taken.places)
    assert len(frozen.values) == 4 and all(map(math.isnan, frozen.gradients))


def test_a_step_that_is_passed_over_has_no_record() -> None:
    observer, kept, sinks = table(nn.Linear(2, 1))
    observer.before_forward(1)  # not finite
    observer.after_update(1, sinks)
    assert kept.records == []


def test_which_steps_are_recorded() -> None:
    observer, _, _ = table(nn.Linear(2, 1))
    assert [step for step in range(1, 200) if observer.wants(step)] == [*range(1, 33), 64, 96, 128, 160, 192]
    observer, _, _ = table(nn.Linear(2, 1), parameters_first_steps=2, parameters_every=5)
    assert [step for step in range(1, 13) if observer.wants(step)] == [1, 2, 5, 10]
    assert not any(table(nn.Linear(2, 1), parameters=[])[0].wants(step) for step in range(1, 100))


def test_a_pattern_that_fits_nothing_is_a_usage_error() -> None:
    with pytest.raises(
        UsageError,
        match=r"record.parameters: '0.wieght' names nothing of the model \(did you mean 0.weight\?\); it has 0.weight",
    ):
        table(nn.Sequential(nn.Linear(2, 1)), parameters=["0.wieght"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"parameters": "0.weight"}, "record.parameters: should be a valid tuple"),
        ({"parameters": [""]}, "a pattern is empty"),
        ({"max_entries": 0}, "record.max_entries"),
        ({"parameter": ["x"]}, "record.parameter: unknown key"),
    ],
)
def test_the_job_file_is_checked(tmp_path: Path, line: dict[str, Any], said: str) -> None:
    with pytest.raises(JobFileError, match=said):
        parse_job({**job(tmp_path).model_dump(exclude_none=True), "record": line})


@pytest.fixture(scope="module")
def recorded(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same 12 steps on 1 to 4 ranks, the one of 2 ranks interrupted and gone on with."""
    folder, settings = tmp_path_factory.mktemp("recorded"), {"parameters": list(PARAMETERS), "max_entries": 7}
    runs: dict[int, Path] = {}
    for ranks in (1, 2, 3, 4):
        whole = {
            "record__" + key: value
            for key, value in (settings | {"parameters_first_steps": 5, "parameters_every": 4}).items()
        }
        jobs = job(folder / str(ranks), micro_batch_size=3, run__steps=12, task__options={"examples": 60}, **whole)
        if ranks == 2:
            first = jobs.model_copy(update={"run": jobs.run.model_copy(update={"steps": 7})})
            assert [ended.kind for ended in train_ranks(rank_pool, ranks, first)] == [""] * ranks
        ended = train_ranks(rank_pool, ranks, jobs, resume="auto")
        assert [each.kind for each in ended] == [""] * ranks, ended[0].message
        runs[ranks] = folder / str(ranks) / "run"
    return runs


def rows(run: Path) -> list[tuple[Any, ...]]:
    with closing(gather(run)) as database:
        order = (
            'SELECT step, name, subname, "index", "row", "column", value, gradient FROM parameters ORDER BY 1, 2, 3, 4'
        )
        return database.execute(order).fetchall()


def test_any_number_of_ranks_records_the_same(recorded: dict[int, Path]) -> None:
    alone = rows(recorded[1])
    assert sorted({row[0] for row in alone}) == [1, 2, 3, 4, 5, 8, 12]
    assert {row[1:3] for row in alone} == {("0", "weight"), ("0", "bias"), ("2", "bias")}
    assert [row[3:6] for row in alone if row[:3] == (1, "0", "weight")] == [
        (0, 0, 0), (2, 0, 2), (5, 1, 0), (7, 1, 2), (9, 1, 4), (12, 2, 2), (14, 2, 4)
    ]  # fmt: skip
    for ranks in (2, 3, 4):
        several = rows(recorded[ranks])
        assert [row[:6] for row in several] == [row[:6] for row in alone]
        for mine, theirs in zip(several, alone, strict=True):
            assert mine[6:] == pytest.approx(theirs[6:], rel=1e-4, abs=1e-6)


def test_gradients_are_the_mean_over_the_whole_batch(recorded: dict[int, Path]) -> None:
    """SGD without clipping: value after = value before - rate * gradient, in the steps that follow each other."""
    found = {(row[0], row[1:4]): row[6:] for row in rows(recorded[3])}
    places = {key for _, key in found}
    assert len(places) == 7 + 3 + 1
    for step in range(1, 5):
        for place in places:
            value, gradient = found[step, place]
            assert found[step + 1, place][0] == pytest.approx(value - 0.05 * gradient, rel=1e-5, abs=1e-7)


def test_a_pattern_that_fits_nothing_leaves_nothing_behind(rank_pool: RankPool, tmp_path: Path) -> None:
    ended = train_ranks(rank_pool, 2, job(tmp_path, record__parameters=["body.*"]))
    assert [each.kind for each in ended] == ["UsageError"] * 2
    assert "'body.*' names nothing of the model" in ended[0].message
    assert not (tmp_path / "run").exists()
