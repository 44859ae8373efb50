"""Runs with every optimizer, with groups, a momentum that follows a schedule, a plateau, and a frozen backbone: against
plain torch in one process with the whole batch, and against runs that were never stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddp import checkpoint
from ddp.checkpoint.export import export
from ddp.job import Job, load_job
from ddp.tasks.base import Goal, TensorExamples
from ddp.training.data import BatchPlan
from ranks import RankPool
from training_runs import EXAMPLES, Misbehaving, differences, job, saved, steps_of, train_ranks

STEPS, BATCH = 8, 7  # within the first epoch; two ranks have 4 and 3 examples
TORCHS: dict[str, tuple[dict[str, Any], Callable[[Iterable[nn.Parameter]], Optimizer]]] = {
    "sgd": ({}, lambda p: SGD(p, lr=1e-3)),
    "momentum": ({"weight_decay": 0.1}, lambda p: SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1)),
    "nesterov": ({"learning_rate": 0.03}, lambda p: SGD(p, lr=0.03, momentum=0.9, nesterov=True)),
    "adagrad": ({"learning_rate_decay": 0.1}, lambda p: Adagrad(p, lr_decay=0.1)),
    "rmsprop": ({"momentum": 0.5, "centered": True}, lambda p: RMSprop(p, momentum=0.5, centered=True)),
    "adadelta": ({}, Adadelta),
    "adam": ({"weight_decay": 0.1}, lambda p: Adam(p, weight_decay=0.1)),
    "adamw": ({}, lambda p: AdamW(p, weight_decay=0.0)),
}


def optimizer_settings(**settings: Any) -> dict[str, Any]:
    return {f"optimizer__{key}": value for key, value in settings.items()}


def bare_job(folder: Path, **settings: Any) -> Job:
    """Without the learning rate of `training_runs.job`, whose place the optimizer's own takes."""
    whole = job(folder, global_batch_size=BATCH, micro_batch_size=BATCH, **settings).model_dump(
        exclude_none=True, exclude={"optimizer"}
    )
    own = {key.removeprefix("optimizer__"): value for key, value in settings.items() if key.startswith("optimizer__")}
    return Job.model_validate({**whole, "optimizer": own})


def plain(make: Callable[[nn.Module], Optimizer], steps: int, before_step: Callable[[int], None]) -> list[Tensor]:
    """The parameters of one process with the whole batch, gradients of a norm above 1 cut to it."""
    _, inputs, targets = Reference().datasets()[0].tensors  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = Reference().model()
    optimizer = make(model)
    order = BatchPlan(EXAMPLES, BATCH, BATCH, 1, 0).order(0)
    for step in range(1, steps + 1):
        batch = order[BATCH * (step - 1) : BATCH * step]
        optimizer.zero_grad()
        (model(inputs[batch])[:, 0] - targets[batch]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before_step(step)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


class Reference(Misbehaving):
    """The task without ranks."""

    def __init__(self) -> None:
        self.action, self.examples, self.example, self.where, self.is_the_one = "none", EXAMPLES, -1, "", False


def assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TORCHS)
def test_every_optimizer_is_torchs_with_the_whole_batch(rank_pool: RankPool, tmp_path: Path, name: str) -> None:
    settings, make = TORCHS[name]
    expected = plain(lambda model: make(model.parameters()), STEPS, lambda step: None)
    own = optimizer_settings(name=name, gradient_clip_norm=1.0, **settings)
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        ended = train_ranks(rank_pool, ranks, bare_job(folder, run__steps=STEPS, **own))
        assert [each.kind for each in ended] == [""] * ranks
        for each in ended:
            assert_near(each.parameters, expected)
        assert steps_of(folder / "run")[-1].noise is not None
    assert differences(ended[0].parameters, ended[1].parameters) == []
    metrics = {record.noise.headline for record in steps_of(tmp_path / "2" / "run") if record.noise is not None}
    assert metrics == {"plain"} or name in ("adam", "adamw")  # no other's preconditioner is known


GROUPS = [
    {"parameters": ["2.weight"], "learning_rate_factor": 3.0},
    {"parameters": ["*.bias"], "learning_rate_factor": 0.5, "weight_decay": 0.0},
]


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_groups_and_a_momentum_on_its_way_are_torchs_and_resume_bit_for_bit(
    rank_pool: RankPool, tmp_path: Path, name: str
) -> None:
    start = {"betas": [0.5, 0.9]} if name == "adam" else {"momentum": 0.5}
    own = {"name": name, "learning_rate": 0.02, "weight_decay": 0.3, "gradient_clip_norm": 1.0, **start}
    own |= {"groups": GROUPS, "final_momentum": 0.99, "momentum_steps": 5}
    schedule = {"schedule__name": "step", "schedule__step_every_steps": 3, "schedule__factor": 0.5}
    made: list[Optimizer] = []

    def make(model: nn.Module) -> Optimizer:
        p = dict(model.named_parameters())
        groups = [
            {"params": [p["2.weight"]]},
            {"params": [p["0.bias"], p["2.bias"]], "weight_decay": 0.0},
            {"params": [p["0.weight"]]},
        ]
        kinds: Mapping[str, Callable[..., Optimizer]] = {"momentum": SGD, "adam": Adam, "rmsprop": RMSprop}
        made.append(kinds[name](groups, lr=0.02, weight_decay=0.3))
        return made[0]

    def set_rates(step: int) -> None:
        momentum = 0.5 + 0.49 * min((step - 1) / 5, 1)
        for group, factor in zip(made[0].param_groups, (3.0, 0.5, 1.0), strict=True):
            group["lr"] = factor * 0.02 * 0.5 ** ((step - 1) // 3)
            group.update({"betas": (momentum, 0.9)} if name == "adam" else {"momentum": momentum})

    expected = plain(make, STEPS, set_rates)
    settings = {**optimizer_settings(**own), **schedule}
    whole = train_ranks(rank_pool, 2, bare_job(tmp_path / "whole", run__steps=STEPS, **settings))
    for each in whole:
        assert_near(each.parameters, expected)
    train_ranks(rank_pool, 2, bare_job(tmp_path / "parts", run__steps=4, **settings))
    train_ranks(rank_pool, 2, bare_job(tmp_path / "parts", run__steps=STEPS, **settings), resume="auto")
    both = [saved(tmp_path / part / "run", STEPS, 2) for part in ("whole", "parts")]
    assert differences(both[0], both[1]) == []
    group = both[0]["shared"]["optimizer"]["param_groups"][0]
    assert group["learning_rate_factor"] == 3.0 and group["param_names"] == ["2.weight"]
    other = {**settings, "optimizer__groups": [{"parameters": ["0.weight"]}, *GROUPS[1:]], "run__id": "other"}
    path = str(checkpoint.find(tmp_path / "whole" / "run" / "checkpoints", STEPS))
    refused = train_ranks(rank_pool, 2, bare_job(tmp_path / "other", run__steps=9, **other), resume=path)
    assert {each.kind for each in refused} == {"CheckpointError"}
    assert "a group of 2.weight there, of 0.weight here" in refused[0].message


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"parameters": ["1.*"]}], "optimizer.groups.0.parameters: '1.*' names nothing"),
        ([{"parameters": ["*"]}, {"parameters": ["0.*"]}], "optimizer.groups.1.parameters: all that 0.* names is"),
    ],
)
def test_a_group_without_parameters_is_a_mistake(
    rank_pool: RankPool, tmp_path: Path, groups: list[dict[str, Any]], words: str
) -> None:
    ended = train_ranks(rank_pool, 2, bare_job(tmp_path, optimizer__groups=groups))
    assert {each.kind for each in ended} == {"UsageError"} and words in ended[0].message
    assert list(tmp_path.iterdir()) == []


def test_a_plateau_follows_torchs_on_all_ranks_and_resumes(rank_pool: RankPool, tmp_path: Path) -> None:
    settings = {"schedule__name": "plateau", "schedule__factor": 0.5, "schedule__patience": 1, "schedule__cooldown": 1}
    settings |= {"schedule__threshold": 0.02, "optimizer__name": "sgd", "optimizer__learning_rate": 0.2}
    settings |= {"evaluation__every_steps": 2, "schedule__metric": "error"}
    ended = train_ranks(rank_pool, 3, job(tmp_path / "whole", run__steps=40, **settings))
    assert {each.kind for each in ended} == {""}
    database = tmp_path / "whole" / "run"
    torchs = SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = ReduceLROnPlateau(torchs, "min", 0.5, 1, threshold=0.02, cooldown=1)
    values, expected = validation_errors(database), []
    for value in values:
        expected += [torchs.param_groups[0]["lr"]] * 2
        scheduler.step(value)
    rates = [record.learning_rate for record in steps_of(database)]
    assert rates == pytest.approx(expected, rel=1e-12) and rates[-1] < 0.03
    for steps in (7, 18, 40):
        train_ranks(rank_pool, 3, job(tmp_path / "parts", run__steps=steps, **settings), resume="auto")
    both = [saved(tmp_path / part / "run", 40, 3) for part in ("whole", "parts")]
    assert differences(both[0], both[1]) == []
    unknown = train_ranks(rank_pool, 2, job(tmp_path / "bad", **{**settings, "schedule__metric": "eror"}))
    assert "schedule.metric: the task has no metric 'eror' (did you mean error?)" in unknown[0].message


def validation_errors(run_directory: Path) -> list[float]:
    from ddp.telemetry.recording import open_recording, read_evaluations

    database = open_recording(run_directory / "run.db")
    try:
        return [each.metrics["error"] for each in read_evaluations(database) if each.split == "validation"]
    finally:
        database.close()


class Backbone:
    """Classes of points, by a backbone with batch normalisation and a head of so many outputs."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def model(self) -> nn.Module:
        model = nn.Sequential()
        model.add_module(
            "features", nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh())
        )
        model.add_module("head", nn.Linear(5, self.classes))
        return model

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        inputs = torch.randn(61, 4, generator=torch.Generator().manual_seed(4))
        labels = (inputs.sum(dim=1) > 0).long() + self.classes - 2
        return TensorExamples(inputs, labels), TensorExamples(inputs[:21], labels[:21])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": model(batch[0]).argmax(dim=1) == batch[1]}


def test_a_new_head_on_a_frozen_backbone(rank_pool: RankPool, tmp_path: Path) -> None:
    """Trained, exported, taken over, frozen: bit for bit the same after training and after a resume without the file."""
    task = {"task__name": "test_optimizers_on_ranks:Backbone", "evaluation__metric": "accuracy", "run__steps": 12}
    task |= {"noise_scale__sample_every": 2, "optimizer__name": "adam"}
    before = train_ranks(rank_pool, 2, job(tmp_path / "before", **task, task__options={"classes": 2}))
    assert {each.kind for each in before} == {""}
    file = tmp_path / "model.safetensors"
    export(checkpoint.find(tmp_path / "before" / "run" / "checkpoints", 12), file)
    tuning = {**task, "task__options": {"classes": 3}, "initialisation__file": str(file)}
    unfit = train_ranks(rank_pool, 2, job(tmp_path / "unfit", **tuning))
    assert {each.kind for each in unfit} == {"UsageError"} and not (tmp_path / "unfit" / "run").exists()
    assert "head.weight (2, 5), here (3, 5)" in unfit[0].message and 'skip = ["head.*"]' in unfit[0].message
    tuning |= {"initialisation__skip": ["head.*"], "initialisation__freeze": ["features.*"]}
    tuning |= {"optimizer__groups": [{"parameters": ["head.bias"], "learning_rate_factor": 10.0, "weight_decay": 0.0}]}
    ended = train_ranks(rank_pool, 2, job(tmp_path, **tuning))
    assert [each.kind for each in ended] == ["", ""], ended[0].message
    state = saved(tmp_path / "run", 12, 2)
    backbone = saved_by(file)
    for rank in range(2):
        tensors = {**state["shared"]["parameters"], **state["own"][rank]["buffers"]}
        assert all(torch.equal(tensors[name], each) for name, each in backbone.items() if name.startswith("features."))
    assert len(state["shared"]["optimizer"]["state"]) == 2  # the head's two
    readings = [record.noise for record in steps_of(tmp_path / "run")]
    assert all(each is not None and math.isfinite(each.plain.variance_trace) for each in readings[2:])
    with_all = {"normalisation__sync_batch_norm": True, "averaged_weights__decay": 0.9, "optimizer__sam_rho": 0.05}
    for name, more in (("all", with_all), ("split", {"noise_scale__split": True})):
        ranks = 3 if name == "all" else 1
        others = train_ranks(rank_pool, ranks, job(tmp_path / name, **tuning, **more))
        assert {each.kind for each in others} == {""}, others[0].message
        held = saved(tmp_path / name / "run", 12, ranks)
        for rank in range(ranks):
            tensors = {**held["shared"]["parameters"], **held["own"][rank]["buffers"]}
            assert all(torch.equal(tensors[key], each) for key, each in backbone.items() if key.startswith("features."))
    file.unlink()
    longer = train_ranks(rank_pool, 2, job(tmp_path, **{**tuning, "run__steps": 15}), resume="auto")
    assert {each.kind for each in longer} == {""}
    new = train_ranks(rank_pool, 2, job(tmp_path / "new", **tuning))
    assert {each.kind for each in new} == {"UsageError"} and "initialisation.file" in new[0].message
    nothing = train_ranks(
        rank_pool, 1, job(tmp_path / "nothing", **{**task, **NOTHING, "task__options": {"classes": 2}})
    )
    assert "initialisation.freeze" in nothing[0].message and "nothing to train" in nothing[0].message


def test_the_example_of_fine_tuning(rank_pool: RankPool, tmp_path: Path) -> None:
    examples = Path(__file__).parent.parent / "examples"
    here = [f"run.directory={tmp_path}", "run.epochs=1", "run.threads_per_rank=1", "metrics.enabled=false"]
    train_ranks(rank_pool, 2, load_job(examples / "digits.toml", [*here, "run.id=backbone"]))
    file = tmp_path / "backbone.safetensors"
    export(checkpoint.find(tmp_path / "backbone" / "checkpoints", 23), file)
    job_here = load_job(examples / "fine_tuning.toml", [*here, "run.id=run", f"initialisation.file={file}"])
    ended = train_ranks(rank_pool, 2, job_here)
    assert [each.kind for each in ended] == ["", ""], ended[0].message
    records = steps_of(tmp_path / "run")
    assert records[-1].loss < 0.8 * records[0].loss
    assert records[0].momentum == 0.5 and 0.87 < records[-1].momentum < 0.9
    group = saved(tmp_path / "run", 23, 2)["shared"]["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(10 * records[-1].learning_rate)


NOTHING = {"initialisation__freeze": ["*"]}


def saved_by(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
