"""A resumed run is the same run, bit for bit; and what `--resume` accepts and refuses."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp.errors import UsageError
from ddp.job import Job
from ddp.training.resume import find_origin
from ranks import RankPool
from training_runs import (
    EXAMPLES,
    INPUTS,
    Ended,
    Misbehaving,
    differences,
    job,
    saved,
    steps_of,
    train_one,
    train_ranks,
)

# 1,472 = 4 x 350 + 72: steps 5 and 10 end an epoch, their batch is uneven.
DIGITS = {
    "task__name": "digits",
    "task__channels": 3,
    "task__batch_norm": True,
    "task__dropout": 0.2,
    "batch__global_batch_size": 350,
    "batch__micro_batch_size": 100,
    "optimizer__name": "adamw",
    "optimizer__learning_rate": 0.01,
    "optimizer__gradient_clip_norm": 0.3,
    "transport__name": "shared_memory",
}


def digits(folder: Path, **settings: Any) -> Job:
    return job(folder, **{**DIGITS, **settings})


def all_but_times(run_directory: Path) -> list[str]:
    """Every step's record without what a clock measured."""
    records = steps_of(run_directory)
    return [
        repr((r.step, r.epoch, r.examples, r.examples_total, r.loss, r.learning_rate, r.gradient_norm, r.reading))
        for r in records
    ]


def assert_the_same_run(one: Path, other: Path, steps: int, world_size: int) -> None:
    assert all_but_times(one) == all_but_times(other)
    assert len(all_but_times(one)) == steps
    assert differences(saved(one, steps, world_size), saved(other, steps, world_size)) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_five_and_five_steps_are_ten(rank_pool: RankPool, tmp_path: Path, world_size: int) -> None:
    """The first run ends in the middle of the second epoch (7 steps), then at its end, then goes on to the third."""
    train_ranks(rank_pool, world_size, digits(tmp_path / "whole", run__steps=12))
    for steps in (5, 7, 12):
        (ended, *_) = train_ranks(rank_pool, world_size, digits(tmp_path, run__steps=steps), resume="auto")
        assert ended.kind == "" and f"{steps} steps" in ended.printed
    whole = tmp_path / "whole" / "run"
    assert_the_same_run(tmp_path / "run", whole, 12, world_size)
    if world_size > 1:
        norms = [record.gradient_norm for record in steps_of(whole)]
        assert max(norms) > 0.3  # clipped somewhere


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_in_the_middle_of_a_run_with_a_schedule(
    rank_pool: RankPool, tmp_path: Path, world_size: int
) -> None:
    """From a path, under a new id; the readings reach a full window."""
    cosine = {"schedule__name": "cosine", "schedule__warmup_steps": 3, "run__steps": 33, "task__channels": 1}
    cosine |= {"checkpoint__every_steps": 4, "checkpoint__keep": 9}
    train_ranks(rank_pool, world_size, digits(tmp_path, **cosine))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000028"
    train_ranks(rank_pool, world_size, digits(tmp_path, run__id="branch", **cosine), resume=str(checkpoint))
    whole, branch = tmp_path / "run", tmp_path / "branch"
    assert all_but_times(branch) == all_but_times(whole)[28:]
    assert differences(saved(branch, 33, world_size), saved(whole, 33, world_size)) == []
    if world_size > 1:
        readings = [record.reading for record in steps_of(branch)]
        assert readings[-1] is not None and readings[-1].observations == 33


def test_a_path_continues_its_own_run(rank_pool: RankPool, tmp_path: Path) -> None:
    """Without an id in the job: the directory's name is the run's. Later steps of the record are taken again."""
    settings = {"run__steps": 11, "checkpoint__every_steps": 4, "checkpoint__keep": 9}
    train_ranks(rank_pool, 2, job(tmp_path, **settings))
    before = all_but_times(tmp_path / "run")
    elsewhere = job(tmp_path / "elsewhere", **{**settings, "run__id": None})
    for path in (tmp_path / "run" / "checkpoints" / "step-00000004", tmp_path / "run"):
        (ended, _) = train_ranks(rank_pool, 2, elsewhere, resume=str(path))
        assert ended.kind == "" and "run           run:" in ended.printed
        assert all_but_times(tmp_path / "run") == before
    assert not (tmp_path / "elsewhere").exists()


def test_every_generator_goes_on(rank_pool: RankPool, tmp_path: Path) -> None:
    """A data set that draws from Python's, numpy's and torch's generators, evaluation in between."""
    random = {"task__options": {"action": "random"}, "transport__name": "shared_memory"}
    train_ranks(rank_pool, 3, job(tmp_path / "whole", run__steps=9, **random))
    for steps in (4, 9):
        train_ranks(rank_pool, 3, job(tmp_path, run__steps=steps, **random), resume="auto")
    assert_the_same_run(tmp_path / "run", tmp_path / "whole" / "run", 9, 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_with_workers_too_every_generator_goes_on(rank_pool: RankPool, tmp_path: Path, world_size: int) -> None:
    """Parts that end in the middle of an epoch, each with another number of workers; micro-batches, uneven last batches."""
    random = {"task__options": {"action": "random"}, "transport__name": "shared_memory", "micro_batch_size": 2}
    train_ranks(rank_pool, world_size, job(tmp_path / "whole", run__steps=13, data__workers=2, **random))
    for steps, workers in ((4, 1), (8, 3), (13, 2)):
        part = job(tmp_path, run__steps=steps, data__workers=workers, data__prefetch=workers, **random)
        train_ranks(rank_pool, world_size, part, resume="auto")
    assert_the_same_run(tmp_path / "run", tmp_path / "whole" / "run", 13, world_size)


class Noted(Misbehaving):
    """Writes down which examples are trained on, a line a micro-batch, for each rank of each part of the run."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.notes = Path(folder) / f"{dist.get_world_size()}-{dist.get_rank()}"

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if model.training:
            with self.notes.open("a") as file:
                file.write(json.dumps(batch[0].tolist()) + "\n")
        return super().loss(model, batch)


@pytest.mark.parametrize("worlds", [(2, 4), (4, 1), (3, 2)], ids=str)
def test_another_number_of_ranks_goes_on(rank_pool: RankPool, tmp_path: Path, worlds: tuple[int, int]) -> None:
    """From the middle of the first epoch to the end of the second: the losses of ranks that never changed, and each example
    once an epoch. (`test_measurement` has the readings.)"""
    notes = tmp_path / "notes"
    notes.mkdir()
    task = {"task__name": "test_resume:Noted", "task__options": {"folder": str(notes)}}
    settings = {**task, "optimizer__name": "adamw", "global_batch_size": 19, "micro_batch_size": 2}
    settings |= {"noise_scale__sample_every": 1}
    before, after = worlds
    train_ranks(rank_pool, before, job(tmp_path, run__steps=3, **settings))
    ended = rank_pool.run(after, train_one_listening, [job(tmp_path, run__steps=8, **settings)] * after, "auto")
    assert [one.kind for one, _ in ended] == [""] * after, ended
    assert [logged.count(f"written by {before} rank(s) and goes on with {after}") for _, logged in ended] == [
        1,
        *[0] * (after - 1),
    ]
    taken = Counter(trained_on(notes, before) + trained_on(notes, after))
    assert taken == Counter(dict.fromkeys(range(EXAMPLES), 2))
    assert_alike(rank_pool, tmp_path, worlds, settings)


def trained_on(notes: Path, world_size: int) -> list[int]:
    """Without the first micro-batch of each part, whose gradient only settles DDP's buckets."""
    texts = [(notes / f"{world_size}-{rank}").read_text() for rank in range(world_size)]
    return [example for text in texts for line in text.splitlines()[1:] for example in json.loads(line)]


def assert_alike(rank_pool: RankPool, folder: Path, worlds: tuple[int, int], settings: Mapping[str, Any]) -> None:
    train_ranks(rank_pool, worlds[0], job(folder / "whole", run__steps=8, **settings))
    changed, whole = steps_of(folder / "run"), steps_of(folder / "whole" / "run")
    assert [record.examples_total for record in changed] == [record.examples_total for record in whole]
    assert [record.loss for record in changed] == pytest.approx([record.loss for record in whole], rel=1e-5)
    one, other = changed[-1].reading, whole[-1].reading
    assert one is not None and other is not None and one.observations == other.observations == 8


class Variable(Misbehaving):
    """The model and the number of examples are what the file `source` says when the task is made."""

    def __init__(self, source: str) -> None:
        says = json.loads(Path(source).read_text())
        super().__init__(examples=says.get("examples", EXAMPLES))
        self.width, self.bias = says.get("width", 3), says.get("bias", True)
        self.buffer = says.get("buffers", [1, 1])[dist.get_rank()]

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(INPUTS, self.width, bias=self.bias), nn.Tanh(), nn.Linear(self.width, 1))
        model.register_buffer("mean", torch.zeros(self.buffer))
        Misbehaving.last_model = model
        return model


@pytest.mark.parametrize(
    "now, said",
    [
        ({"width": 1}, "parameter 0.weight is float32 (3, 5) there and float32 (1, 5) here"),
        ({"bias": False}, "parameter 0.bias is float32 (3,) there and missing here"),
        ({"buffers": [4, 4]}, "buffer mean is float32 (1,) there and float32 (4,) here"),
        ({"buffers": [1, 4]}, "buffer mean is float32 (1,) there and float32 (4,) here"),
        ({"examples": 50}, "written while training on 61 examples, the training set now has 50"),
    ],
    ids=str,
)
def test_another_model_or_other_data_is_refused_by_all(
    rank_pool: RankPool, tmp_path: Path, now: dict[str, Any], said: str
) -> None:
    source = tmp_path / "source.json"
    task = {"task__name": "test_resume:Variable", "task__options": {"source": str(source)}}
    source.write_text("{}")
    assert train_ranks(rank_pool, 2, job(tmp_path, run__steps=4, **task))[1].kind == ""
    before, records = saved(tmp_path / "run", 4, 2), all_but_times(tmp_path / "run")
    source.write_text(json.dumps(now))
    ended = train_ranks(rank_pool, 2, job(tmp_path, run__steps=8, **task), resume="auto")
    assert [one.kind for one in ended] == ["CheckpointError"] * 2, ended
    (message,) = {one.message for one in ended}
    assert "step-00000004" in message and said in message
    assert all_but_times(tmp_path / "run") == records
    assert differences(saved(tmp_path / "run", 4, 2), before) == []
    (held,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert held.name.startswith("step-00000004-loss=")
    source.write_text("{}")
    assert train_ranks(rank_pool, 2, job(tmp_path, run__steps=8, **task), resume="auto")[1].kind == ""


def train_one_listening(
    rank: int, world_size: int, store_address: str, jobs: Sequence[Job], resume: str
) -> tuple[Ended, str]:
    """`train_one`, and what was logged meanwhile."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    log = logging.getLogger("ddp")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        return train_one(rank, world_size, store_address, jobs, resume), logged.getvalue()
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)


def overwrite(record: Path) -> None:
    record.write_bytes(b"no database " * 1000)


def spoil_all_but_the_first_page(record: Path) -> None:
    """It opens, and what is read first fails."""
    size_bytes = record.stat().st_size
    with record.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size_bytes - 4096))


@pytest.mark.parametrize("damage", [overwrite, spoil_all_but_the_first_page])
def test_a_damaged_record_does_not_stop_a_resume(
    rank_pool: RankPool, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    train_ranks(rank_pool, 1, job(tmp_path, run__steps=40))
    damage(tmp_path / "run" / "run.db")
    ((ended, logged),) = rank_pool.run(1, train_one_listening, [job(tmp_path, run__steps=44)], "auto")
    assert ended.kind == "", ended
    assert "44 steps" in ended.printed
    assert logged.count("the summary will not know the steps before this part") == 1, logged
    assert logged.count("the record of the run is incomplete, training goes on") == 1, logged
    assert saved(tmp_path / "run", 44, 1)["shared"]["counters"]["step"] == 44


def test_a_finished_run_ends_well_again(rank_pool: RankPool, tmp_path: Path) -> None:
    train_ranks(rank_pool, 2, digits(tmp_path, run__steps=3))
    before, records = saved(tmp_path / "run", 3, 2), all_but_times(tmp_path / "run")
    ended = train_ranks(rank_pool, 2, digits(tmp_path, run__steps=3), resume="auto")
    assert [one.kind for one in ended] == ["", ""]
    assert "3 steps" in ended[0].printed
    assert differences(saved(tmp_path / "run", 3, 2), before) == []
    assert all_but_times(tmp_path / "run") == records
    ended = train_ranks(rank_pool, 2, digits(tmp_path, run__steps=2), resume="auto")  # shorter than it was
    assert [one.kind for one in ended] == ["", ""]
    assert differences(saved(tmp_path / "run", 3, 2), before) == []


NOW = datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_auto_without_a_run_id_is_refused() -> None:
    nameless = job(Path("runs"), run__id=None)
    with pytest.raises(UsageError, match="which run"):
        find_origin(nameless, {}, "auto", NOW, "abcd")
    assert find_origin(nameless, {}, None, NOW, "abcd").run_id.endswith("-20310203-040506-abcd")
    assert find_origin(nameless, {"DDP_RUN_ID": "given"}, "auto", NOW, "abcd").run_id == "given"


def test_auto_of_a_run_that_has_not_begun_begins_it(tmp_path: Path) -> None:
    origin = find_origin(job(tmp_path), {}, "auto", NOW, "abcd")
    assert (origin.run_id, origin.checkpoint, origin.step) == ("run", None, 0)


@pytest.mark.parametrize("folders", ["", "run", "run/checkpoints"])
def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path, folders: str) -> None:
    (tmp_path / folders).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError, match=f"--resume {tmp_path / 'run'}"):
        find_origin(job(tmp_path), {}, str(tmp_path / "run"), NOW, "abcd")


def test_a_relative_path_names_the_same_run_from_inside(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ranks(rank_pool, 1, job(tmp_path, run__steps=2))
    nameless = job(tmp_path / "elsewhere", run__id=None)
    for start, path in ((tmp_path, "run"), (tmp_path / "run", "."), (tmp_path / "run/checkpoints", "step-00000002")):
        monkeypatch.chdir(start)
        origin = find_origin(nameless, {}, path, NOW, "abcd")
        assert (origin.run_id, origin.step) == ("run", 2)
        assert os.path.samefile(Path(origin.job.run.directory) / origin.run_id, tmp_path / "run")


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_quantising_left_over_goes_on(rank_pool: RankPool, tmp_path: Path, world_size: int) -> None:
    settings = {"transport__wire": "int8", "transport__name": "shared_memory"}
    train_ranks(rank_pool, world_size, digits(tmp_path / "whole", run__steps=9, **settings))
    for steps in (4, 9):
        train_ranks(rank_pool, world_size, digits(tmp_path, run__steps=steps, **settings), resume="auto")
    assert_the_same_run(tmp_path / "run", tmp_path / "whole" / "run", 9, world_size)
    held = saved(tmp_path / "run", 9, world_size)["own"]
    assert all(
        any(map(torch.any, each.values())) for own in held.values() for each in own["exchange"]["left_over"].values()
    )


def test_c10d_with_three_ranks_is_the_same_to_rounding_and_says_so(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"transport__name": "c10d", "optimizer__name": "adamw", "run__steps": 12}
    train_ranks(rank_pool, 3, job(tmp_path / "whole", **settings))
    train_ranks(rank_pool, 3, job(tmp_path, **{**settings, "run__steps": 5}))
    ended = rank_pool.run(3, train_one_listening, [job(tmp_path, **settings)] * 3, "auto")
    assert [one.kind for one, _ in ended] == ["", "", ""]
    assert "the resumed run is the one that never stopped to some 1e-6" in ended[0][1]
    whole = steps_of(tmp_path / "whole" / "run")
    assert [record.loss for record in steps_of(tmp_path / "run")] == pytest.approx([r.loss for r in whole], rel=1e-5)
    one, other = (saved(folder / "run", 12, 3)["shared"]["parameters"] for folder in (tmp_path, tmp_path / "whole"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


class Counting(nn.Module):
    """Keeps a count of its forwards as extra state, and multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, values: Tensor) -> Tensor:
        self.forwards += self.training
        return values * (1 + 0.1 * self.forwards)

    def get_extra_state(self) -> dict[str, int]:
        return {"forwards": self.forwards}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.forwards = state["forwards"]


class Extra(Misbehaving):
    def __init__(self, unsavable: bool = False) -> None:
        super().__init__()
        self.unsavable = unsavable

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(INPUTS, 3), Counting(), nn.Linear(3, 1))
        if self.unsavable:
            model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
        Misbehaving.last_model = model
        return model


def test_extra_state_goes_on(rank_pool: RankPool, tmp_path: Path) -> None:
    task = {"task__name": "test_resume:Extra", "transport__name": "shared_memory", "optimizer__learning_rate": 1e-3}
    train_ranks(rank_pool, 2, job(tmp_path / "whole", run__steps=9, **task))
    for steps in (4, 9):
        train_ranks(rank_pool, 2, job(tmp_path, run__steps=steps, **task), resume="auto")
    assert_the_same_run(tmp_path / "run", tmp_path / "whole" / "run", 9, 2)
    assert saved(tmp_path / "run", 9, 2)["own"][1]["extra_state"] == {"1": {"forwards": 9}}


def test_what_cannot_be_saved_is_refused_before_the_first_step(rank_pool: RankPool, tmp_path: Path) -> None:
    task = {"task__name": "test_resume:Extra", "task__options": {"unsavable": True}}
    ended = train_ranks(rank_pool, 2, job(tmp_path / "runs", **task))
    assert {one.kind for one in ended} == {"UsageError"}, ended
    assert all("the run's state cannot be saved" in one.message and "phase" in one.message for one in ended)
    assert not (tmp_path / "runs").exists()
