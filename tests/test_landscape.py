"""`ddp landscape` against surfaces that are known: a quadratic's, a saddle's; filters against a loop."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddp import checkpoint
from ddp.checkpoint.export import model_state
from ddp.errors import StoppedError
from ddp.job import Job, parse_job
from ddp.landscape.command import in_words
from ddp.landscape.curvature import largest_eigenvalue
from ddp.landscape.directions import filter_normalised, norm_of, unperturbed
from ddp.landscape.finding import Asked, Landscape, Rise, survey, to_json
from ddp.landscape.page import render, shared_levels
from ddp.landscape.surface import Examples
from ddp.tasks import load_task
from ddp.tasks.base import Goal, TensorExamples
from ddp.topology import Topology
from ddp.trained import load_trained
from ddp.training import run
from ddp.training.place import opened_place
from jobs import python, run_command
from ranks import RankPool, process_group
from training_runs import agent_environment

MODULES = ["test_landscape"]
ASKED = Asked(radius=0.8, points=7, examples=50, seed=3)


class Regression:
    """Linear; after so many calls of its loss without a gradient a signal comes to rank 1."""

    goals: Mapping[str, Goal] = {}
    signal_after = -1

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        x = torch.randn(41, 3, generator=torch.Generator().manual_seed(3))
        return TensorExamples(x), TensorExamples(x)

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        if not torch.is_grad_enabled() and torch.distributed.get_rank() == 1:
            Regression.signal_after -= 1
            if Regression.signal_after == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return (model(batch[0]) - batch[0].sum(dim=1, keepdim=True)).square().sum(dim=1)

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Tensor]:
        return {}


def job(folder: Path, run_id: str, **task: Any) -> Job:
    return parse_job(
        {
            "run": {"id": run_id, "directory": str(folder), "steps": 3, "device": "cpu", "threads_per_rank": 1},
            "task": task,
            "batch": {"global_batch_size": 12},
            "optimizer": {"name": "sgd", "learning_rate": 0.05},
            "evaluation": {"metric": "loss"},
            "noise_scale": {"enabled": False},
            "transport": {"timeout_seconds": 30.0},
            "metrics": {"enabled": False},
        }
    )


def _at(rank: int, world_size: int, restarts: int = 0) -> Topology:
    return Topology(rank, world_size, rank, world_size, launcher="torchrun", restarts=restarts)


def trained(rank: int, world_size: int, store_address: str, jobs: list[Job]) -> None:
    for number, each in enumerate(jobs):
        with agent_environment(store_address), contextlib.redirect_stdout(io.StringIO()):
            run.train(each, _at(rank, world_size, number), allow_import=MODULES)


def surveyed(rank: int, world_size: int, store_address: str, of: Job, path: Path) -> tuple[Landscape, bool]:
    """The landscape, and whether the network was left as it was."""
    with agent_environment(store_address), opened_place(of, _at(rank, world_size)) as place:
        (network,) = load_trained(place, [path], allow_import=MODULES)
        before = [each.detach().clone() for each in network.module.parameters()]
        found = survey(place, network, ASKED)
        same = all(torch.equal(one, other) for one, other in zip(before, network.module.parameters(), strict=True))
    return found, same


def test_a_quadratics_surface_is_its_formula_in_every_bit_at_any_number_of_ranks(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    bowl = job(tmp_path, "bowl", name="quadratic", dimension=6, condition_number=20.0, noise=0.1)
    rank_pool.run(2, trained, [bowl])
    found = {count: rank_pool.run(count, surveyed, bowl, tmp_path / "bowl") for count in (1, 2, 3)}
    first = found[1][0][0]
    for each, same in (answer for answers in found.values() for answer in answers):
        assert same and np.array_equal(each.losses, first.losses) and each.sharpness == first.sharpness
    path = checkpoint.newest(tmp_path / "bowl" / "checkpoints")
    assert path is not None
    position = model_state(path, checkpoint.read_manifest(path))["position"].double()
    h = torch.pow(20.0, -torch.linspace(0, 1, 6, dtype=torch.float64))
    module = load_task(bowl.task).model()
    module.load_state_dict({"position": position.float()}, strict=False)
    directions = [filter_normalised(module, ASKED.seed, number)[0].double() for number in range(10)]

    def loss(offset: Tensor) -> float:
        return float(0.5 * (h * (position + offset).square()).sum())

    expected = [[loss(x * directions[0] + y * directions[1]) for x in ASKED.axis] for y in ASKED.axis]
    np.testing.assert_allclose(first.losses, expected, rtol=1e-5)
    assert first.loss == pytest.approx(loss(torch.zeros(6)), rel=1e-6)
    for rise in first.sharpness:  # both ways: what is linear in the offset cancels
        rises = [0.5 * rise.radius**2 * float((h * each.square()).sum()) for each in directions[2:]]
        assert rise.mean == pytest.approx(np.mean(rises), rel=1e-4)
        assert rise.deviation == pytest.approx(np.std(rises, ddof=1), rel=1e-3)
    assert first.largest_eigenvalue == pytest.approx(1.0, rel=0.02)
    assert first.norms[0] == pytest.approx(float(position.norm()), rel=1e-6)


def unmoved(rank: int, world_size: int, store_address: str, of: Job, paths: list[Path]) -> list[set[str]]:
    with agent_environment(store_address), opened_place(of, _at(rank, world_size)) as place:
        return [unperturbed(each.module) for each in load_trained(place, paths)]


def test_the_second_network_of_a_task_is_frozen_as_the_first_is(rank_pool: RankPool, tmp_path: Path) -> None:
    table = {"name": "digits", "channels": 2}
    jobs = [
        parse_job({**job(tmp_path, name, **table).model_dump(exclude_none=True), "initialisation": {"freeze": ["0.*"]}})
        for name in ("one", "two")
    ]
    rank_pool.run(1, trained, jobs)
    (found,) = rank_pool.run(1, unmoved, jobs[0], [tmp_path / "one", tmp_path / "two"])
    assert found[0] == found[1] and "0.weight" in found[0]


def test_each_filter_gets_its_own_norm_and_biases_and_normalisation_none() -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4))
    direction = dict(zip([name for name, _ in module.named_parameters()], filter_normalised(module, 7, 0), strict=True))
    for name, parameter in module.named_parameters():
        if name in ("0.weight", "3.weight"):
            for filter_, own in zip(direction[name], parameter, strict=True):
                assert float(filter_.norm()) == pytest.approx(float(own.detach().norm()), rel=1e-6)
        else:
            assert name in unperturbed(module) and not direction[name].any()
    with torch.no_grad():
        next(module.parameters()).mul_(3.0)
    larger = filter_normalised(module, 7, 0)[0]
    torch.testing.assert_close(larger, 3 * direction["0.weight"])  # the same draw, another scale
    assert not torch.equal(filter_normalised(module, 7, 1)[0], larger)
    assert norm_of([torch.full((2, 2), 2.0)]) == 4.0


class Saddle(nn.Module):
    """Losses (-5 a^2 + 2 b^2) / 2, for each example: the largest eigenvalue is 2, the one of largest magnitude -5."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.tensor([0.3, 0.7]))

    def forward(self, examples: Tensor) -> Tensor:
        return (0.5 * (torch.tensor([-5.0, 2.0]) * self.position.square()).sum()).expand(len(examples))


def eigenvalue(rank: int, world_size: int, store_address: str) -> float:
    place: Any = SimpleNamespace(
        topology=_at(rank, world_size), device=torch.device("cpu"), stop=SimpleNamespace(asked=False)
    )
    task = SimpleNamespace(loss=lambda model, batch: model(batch))
    network: Any = SimpleNamespace(module=Saddle(), plan=SimpleNamespace(task=task))
    with process_group(rank, world_size, store_address):
        return largest_eigenvalue(place, network, Examples([torch.zeros(3), torch.zeros(2)], 5), seed=1)


def test_the_largest_eigenvalue_of_a_saddle_is_not_the_one_of_largest_magnitude(rank_pool: RankPool) -> None:
    for found in rank_pool.run(2, eigenvalue) + rank_pool.run(3, eigenvalue):
        assert found == pytest.approx(2.0, rel=1e-2)


def stopped(rank: int, world_size: int, store_address: str, of: Job, path: Path) -> str:
    with agent_environment(store_address), contextlib.suppress(RuntimeError):
        try:
            with opened_place(of, _at(rank, world_size)) as place:
                (network,) = load_trained(place, [path], allow_import=MODULES)
                Regression.signal_after = 2
                survey(place, network, replace(ASKED, points=101))
        except StoppedError as error:
            return f"{error.exit_code} {error}"
    return "not stopped"


def test_a_signal_to_one_rank_stops_all(rank_pool: RankPool, tmp_path: Path) -> None:
    regression = job(tmp_path, "line", name="test_landscape:Regression")
    rank_pool.run(2, trained, [regression])
    answers = rank_pool.run(2, stopped, regression, tmp_path / "line")
    assert answers == ["75 landscape: stopped by a signal: run it again"] * 2


def test_the_example_draws_sgd_and_sam_side_by_side(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "examples" / "sharpness.py"
    done = run_command(python(str(script), "--epochs", "1", "--points", "5"), tmp_path, timeout=280.0)
    assert done.code == 0, done.stderr
    table = json.loads((tmp_path / "sharpness.json").read_text())
    assert [each["name"] for each in table["networks"]] == ["sgd", "sam"] and len(table["axis"]) == 5
    assert table["networks"][1]["optimizer"] == "sgd with SAM, rho 0.2"
    page = (tmp_path / "sharpness.html").read_text()
    ElementTree.fromstring(page.partition("\n")[2])
    assert page.count("<figure") == 4
    even = run_command(python("-m", "ddp", "landscape", "runs/sharpness/sgd", "--points", "8"), tmp_path)
    assert even.code == 2 and "an odd number" in even.stderr


def test_a_surface_that_is_not_finite_is_drawn_all_the_same() -> None:
    losses = np.array([[1.0, np.nan, np.inf], [0.5, 0.1, 2.0], [1.0, 1.0, 1.0]])
    rises = tuple(Rise(radius, np.nan, np.nan) for radius in (0.25, 0.5, 1.0))
    found = Landscape("a", "p", "sgd", "training", 5, 0.1, losses, (1.0, 1.0), rises, np.nan, 3, ())
    asked = Asked(points=3)
    ElementTree.fromstring(
        render([found, replace(found, name="b", losses=np.full((3, 3), 2.0))], asked, 0.0).partition("\n")[2]
    )
    assert "needs matplotlib" in in_words([found], [Path("n.json")])
    assert "needs matplotlib" not in in_words([found], [Path("n.html"), Path("n.json")])
    assert to_json([found], asked)["networks"][0]["losses"][0] == [1.0, None, None]
    assert shared_levels([np.full((2, 2), np.nan)])[0] == -1.0 and shared_levels([losses])[-1] == pytest.approx(2.0)
    assert shared_levels([losses - 1.0])[0] == pytest.approx(-0.9)
    level = shared_levels([np.array([[0.3, np.nextafter(0.3, 1)]])])  # a radius that rounding swallows
    assert np.all(np.diff(level) > 0) and level[0] < 0.3 < level[-1]
