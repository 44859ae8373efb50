"""The range test on real ranks: planted best rates are met, ranks agree, all is put back bit for bit, and bad ends are clear."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ddp.errors import DdpError
from ddp.job import Job, parse_job
from ddp.lr_finder.finding import Finding, to_json
from ddp.lr_finder.range_test import find_learning_rate
from ddp.tasks.base import Goal, TensorExamples
from ddp.topology import Topology
from ddp.training.place import opened_place
from ddp.training.session import Session, prepared
from jobs import beside_python, run_command
from ranks import RankPool
from training_runs import agent_environment, differences

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, INPUTS = 61, 4


class Regression:
    """Linear, by mean squared error / 2, from targets with noise: its curvatures are the eigenvalues of X'X / n.

    Args:
        bad: the number of a training example that is no number; -1 for none.
        signal_at: the training step in which this process gets SIGTERM.
        still: the loss does not depend on the weights, but for its gradient's sake.
    """

    goals: Mapping[str, Goal] = {"error": "min"}

    def __init__(self, bad: int = -1, signal_at: int = -1, still: bool = False) -> None:
        self.bad, self.signal_at, self.still, self.steps = bad, signal_at, still, 0

    def model(self) -> nn.Module:
        return nn.Linear(INPUTS, 1)

    @staticmethod
    def inputs() -> Tensor:
        draws = torch.randn(EXAMPLES, INPUTS, generator=torch.Generator().manual_seed(3))
        return draws * torch.tensor([1.0, 2.0, 3.0, 4.0])

    @classmethod
    def best_rate(cls) -> float:
        """Of gradient descent with all examples: 2 / (h_max + h_min), the bias as an input that is 1."""
        inputs = torch.cat([cls.inputs(), torch.ones(EXAMPLES, 1)], dim=1).double()
        h = torch.linalg.eigvalsh(inputs.T @ inputs / EXAMPLES)
        return 2 / float(h[0] + h[-1])

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        inputs = self.inputs()
        targets = inputs.sum(dim=1) + 3 + torch.randn(EXAMPLES, generator=torch.Generator().manual_seed(4))
        validation = TensorExamples(inputs.clone(), targets)
        if self.bad >= 0:
            inputs[self.bad] = torch.nan
        return TensorExamples(inputs, targets), validation

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.steps += torch.is_grad_enabled()
        if self.steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        losses = (model(batch[0])[:, 0] - batch[1]).square() / 2
        return 0 * losses + 1 if self.still else losses

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"error": (model(batch[0])[:, 0] - batch[1]).abs()}


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """The same examples again and again, which says of no length."""

    def __init__(self, examples: TensorExamples) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.cycle(zip(*self.examples.tensors, strict=True))  # type: ignore[return-value]


class EndlessRegression(Regression):
    def datasets(self) -> tuple[Any, TensorExamples]:
        training, validation = super().datasets()
        return Endless(training), validation


def _job(name: str = "test_lr_finder:Regression", **settings: Any) -> Job:
    table: dict[str, dict[str, Any]] = {
        "run": {"steps": 50, "device": "cpu", "threads_per_rank": 1, "seed": 2},
        "task": {"name": name},
        "batch": {"global_batch_size": EXAMPLES, "micro_batch_size": EXAMPLES},
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "transport": {"timeout_seconds": 30.0},
        "metrics": {"enabled": False},
        "evaluation": {"metric": "loss"},
        "noise_scale": {"sample_every": 3},
    }
    for key, value in settings.items():
        section, _, field = key.partition("__")
        table.setdefault(section, {})[field] = value
    return parse_job(table)


def _digits(**settings: Any) -> Job:
    sizes = {"batch__global_batch_size": 64, "batch__micro_batch_size": 32}
    return _job("digits", **{**sizes, **settings})


def _find_all(rank: int, world_size: int, store_address: str, cases: Any) -> list[Finding | str]:
    """A finding of each case, a job and what `find_learning_rate` is given; or the error's type and message."""
    found: list[Finding | str] = []
    with agent_environment(store_address), opened_place(cases[0][0], _place(rank, world_size)) as place:
        for job, how in cases:
            try:
                with prepared(place, job, allow_import=["test_lr_finder"]) as here:
                    found.append(find_learning_rate(here, **how))
            except DdpError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def _place(rank: int, world_size: int) -> Topology:
    return Topology(rank, world_size, rank, world_size, launcher="torchrun")


def _train(here: Session, steps: int) -> float:
    data, losses = here.steps(), []
    for _ in range(steps):
        rows = here.trainer.step(data)
        losses.append(sum(row.loss_sum for row in rows) / sum(row.examples for row in rows))
    return sum(losses[-10:]) / max(1, len(losses[-10:]))


def test_the_planted_rate_of_a_linear_regression_is_met_on_1_2_and_3_ranks(rank_pool: RankPool) -> None:
    best = Regression.best_rate()
    case = (_job(), {})
    recommended = []
    for world_size in (1, 2, 3):
        by_rank = [found for (found,) in rank_pool.run(world_size, _find_all, [case])]
        assert all(repr(each) == repr(by_rank[0]) for each in by_rank[1:]), "every rank has the very same finding"
        found = by_rank[0]
        assert isinstance(found, Finding) and found.kind == "found" and len(found.passes) == 2
        assert found.recommended is not None and 1 / 3 < found.recommended / best < 3
        assert found.passes[1].steps_per_e > 1.5 * found.passes[0].steps_per_e
        recommended.append(found.recommended)
    assert recommended == pytest.approx([recommended[0]] * 3, rel=0.1)  # what blows up magnifies rounding


def test_the_best_rate_of_a_noisy_quadratic_is_met(rank_pool: RankPool) -> None:
    """E theta^2 of each axis is (1 - e h)^2 E theta^2 + e^2 sigma^2 / b a step.

    That gives the best constant rate for 25 steps, some of which the zoomed pass spends on a factor of ten. The more steps
    there are, the lower the rate at which the noise leaves least, and the less a test can know of it.
    """
    noise, batch, distance, dimension = 1.0, 16, 8.0, 32
    options = {"name": "quadratic", "noise": noise, "distance": distance, "dimension": dimension}
    job = _job("quadratic", batch__global_batch_size=batch, batch__micro_batch_size=8)
    job = parse_job({**job.model_dump(exclude_none=True), "task": options})

    def left(rate: float) -> float:
        squares = distance**2 / dimension
        for _ in range(25):
            squares = (1 - rate) ** 2 * squares + rate**2 * noise**2 / batch
        return squares

    best = min((10 ** (power / 20) for power in range(-60, 7)), key=left)
    ((found,),) = rank_pool.run(1, _find_all, [(job, {})])
    assert found.recommended is not None and 1 / 3 < found.recommended / best < 3, (found.recommended, best)


def _grid(rank: int, world_size: int, store_address: str, job: Job, rates: list[float]) -> tuple[Finding, list[float]]:
    losses: list[float] = []
    with agent_environment(store_address), opened_place(job, _place(rank, world_size)) as place:
        with prepared(place, job) as here:
            found = find_learning_rate(here)
        for rate in rates:
            section = job.optimizer.model_copy(update={"learning_rate": rate})
            with prepared(place, job.model_copy(update={"optimizer": section})) as here:
                try:
                    losses.append(_train(here, 46))  # two epochs
                except DdpError:
                    losses.append(float("inf"))
    return found, losses


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_best_of_real_runs_on_digits_is_met(rank_pool: RankPool, optimizer: str) -> None:
    rates = [
        10 ** (power / 2) for power in ((-4, -3, -2, -1, 0, 1) if optimizer == "sgd" else (-7, -6, -5, -4, -3, -2))
    ]
    ((found, losses),) = rank_pool.run(1, _grid, _digits(optimizer__name=optimizer), rates)
    best = rates[min(range(len(rates)), key=losses.__getitem__)]
    assert found.recommended is not None
    assert 1 / 3 < found.recommended / best < 3, (found.recommended, dict(zip(rates, losses, strict=True)))


def _restored(rank: int, world_size: int, store_address: str, job: Job, steps: int) -> list[str]:
    """What differs after a test from before it, and after some steps more from a model that was never tested."""
    with agent_environment(store_address), opened_place(job, _place(rank, world_size)) as place:
        with prepared(place, job) as here:
            _train(here, steps)
            before = _everything(here)
            find_learning_rate(here, low=1e-5, steps=20)
            lines = differences(before, _everything(here))
            _train(here, 3)
            tested = _everything(here)
        with prepared(place, job) as here:
            _train(here, steps)
            _train(here, 3)
            return lines + differences(_everything(here), tested)


def _everything(here: Session) -> dict[str, Any]:
    registry = here.trainer.saving.registry
    model = here.trainer.model.module
    buffers, gradients = dict(model.named_buffers()), [each.grad for each in model.parameters()]
    own = (buffers, gradients, [group["lr"] for group in here.trainer.optimizer.param_groups])
    return deepcopy({"shared": registry.shared(), "own": registry.own(), "more": own, "plan": here.trainer.plan})


@pytest.mark.parametrize(
    ("world_size", "steps", "settings"),
    [
        (1, 0, {"optimizer__name": "adam"}),
        (2, 4, {"optimizer__name": "adam", "transport__wire": "int8", "averaged_weights__decay": 0.9}),
        (3, 4, {"optimizer__momentum": 0.9, "schedule__warmup_steps": 9, "faults__on_not_finite": "skip"}),
    ],
)
def test_everything_is_put_back_bit_for_bit(
    rank_pool: RankPool, world_size: int, steps: int, settings: dict[str, Any]
) -> None:
    job = _digits(**settings)
    task = {"name": "digits", "batch_norm": True, "dropout": 0.2}
    job = parse_job({**job.model_dump(exclude_none=True), "task": task})
    for rank, lines in enumerate(rank_pool.run(world_size, _restored, job, steps)):
        assert lines == [], f"rank {rank}"


def test_bad_ends_are_clear_and_shared_by_all_ranks(rank_pool: RankPool) -> None:
    cases = [
        (_job(task__options={"bad": 5}), {}),
        (_job(), {"low": 1e6, "high": 1e9, "steps": 40}),
        (_job(task__options={"still": True}), {"high": 1.0, "steps": 30}),
        (_job(), {"low": 0.1, "high": 0.01}),
        (_job(), {"steps": 3}),
        (_job(), {"high": 1e-3, "low": 1e-6, "steps": 40}),
        (_job(batch__global_batch_size=30, batch__micro_batch_size=7), {"steps": 60}),
        (_digits(batch__global_batch_size="auto"), {"zoom": False}),
        (_job(task__options={"signal_at": 9}), {}),
    ]
    first, second = rank_pool.run(2, _find_all, cases)
    for one, other in zip(first, second, strict=True):
        assert repr(one) == repr(other)
    nan, high, still, swapped, few, narrow, small, auto, stopped = first
    assert nan.kind == "not finite" and "before any update" in nan.verdict
    assert high.kind in ("rises at once", "not finite") and "--from 1e+02" in high.verdict
    assert still.kind == "flat" and still.recommended is None
    assert stopped.startswith("StoppedError: find-lr: stopped by a signal")
    assert swapped.startswith("UsageError: find-lr: rates from 0.1 to 0.01")
    assert few.startswith("UsageError: find-lr: 3 steps")
    assert narrow.passes[0].curve.end == "range" and narrow.kind in ("open", "flat")
    assert small.epochs > 5 and small.kind == "found" and small.global_batch_size == 30
    assert not isinstance(auto, str), auto
    assert auto.kind == "found" and len(auto.passes) == 1


def test_a_stream_without_a_length_has_no_epochs(rank_pool: RankPool) -> None:
    ((found,),) = rank_pool.run(1, _find_all, [(_job("test_lr_finder:EndlessRegression"), {"zoom": False})])
    assert isinstance(found, Finding), found
    assert found.epochs == 0.0 and found.kind == "found"


def test_the_rates_are_those_of_the_job_whatever_factor_its_batch_gives_them(rank_pool: RankPool) -> None:
    plain = (_job(), {"zoom": False})
    tuned = {"optimizer__tuned_batch_size": EXAMPLES // 4, "optimizer__learning_rate_rule": "linear"}
    ((one, other),) = rank_pool.run(1, _find_all, [plain, (_job(**tuned), {"zoom": False})])
    assert other.batch_factor == pytest.approx(EXAMPLES / (EXAMPLES // 4))
    assert other.recommended * other.batch_factor == pytest.approx(one.recommended, rel=0.3)


def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    job = _digits()
    (tmp_path / "job.toml").write_text(job.to_toml())
    torchrun = [beside_python("torchrun"), "--standalone", "--nproc-per-node=2", "-m", "ddp", "find-lr", "job.toml"]
    ended = run_command([*torchrun, "--json", "--steps", "40", "--set", "optimizer.momentum=0.9"], tmp_path)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["setting"] == f"--set optimizer.learning_rate={found['recommended']:.2g}"
    assert len(found["passes"]) == 2 and found["kind"] == "found" and found["page"] == "find-lr.html"
    page = (tmp_path / "find-lr.html").read_text()
    assert page.count("<svg") == 2 and "https:" not in page and "src=" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["find-lr.html", "job.toml"]


def test_the_page_of_every_outcome_is_whole(rank_pool: RankPool) -> None:
    from xml.etree import ElementTree

    from ddp.lr_finder.page import render

    cases = [(_job(), {}), (_job(task__options={"bad": 5}), {}), (_job(), {"low": 1e6, "high": 1e9, "steps": 40})]
    (found,) = rank_pool.run(1, _find_all, cases)
    for each in found:
        text = render(each, "a <task>", 1e9)
        ElementTree.fromstring(text.partition("\n")[2])
        assert "a &lt;task&gt;" in text and to_json(each)["verdict"][:13] in text


def _example(rank: int, world_size: int, store_address: str) -> str:
    with agent_environment(store_address):
        job = _digits(optimizer__name="sgd")
        return runpy.run_path(str(ROOT / "examples" / "find_lr.py"))["trained"](job, _place(rank, world_size))


def test_the_example_trains_with_what_it_found(rank_pool: RankPool) -> None:
    (found,) = rank_pool.run(1, _example)
    first, last = (float(part.split()[-1]) for part in (found.partition(" at first")[0], found.partition(" after")[0]))
    assert "Recommended" in found and last < first / 4
