"""`ddp ensemble` against explicit loops over members in one process, in float64, at 1, 2 and 3 ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from ddp import checkpoint
from ddp.checkpoint.export import model_state
from ddp.ensemble.combining import Ensemble, Member, combine, log_mean_probabilities
from ddp.ensemble.command import Distil, Request, make_ensemble
from ddp.ensemble.distillation import OPTIONAL, Distillation, soft_loss
from ddp.ensemble.same_data import fingerprint
from ddp.ensemble.soup import recompute_statistics
from ddp.ensemble.sweep_results import best_runs
from ddp.errors import DdpError, UsageError
from ddp.job import DigitsSection, Job, PrecisionSection, load_job, parse_job
from ddp.tasks.base import TensorExamples
from ddp.tasks.digits import DigitsTask
from ddp.topology import Topology
from ddp.training import run
from ddp.training.data import split
from ddp.training.initialisation import freeze_
from ddp.training.labels import labels_of
from jobs import python, run_command
from ranks import RankPool, process_group
from training_runs import agent_environment, steps_of

CHANNELS = {"a": 4, "b": 4, "c": 6}


def digits(folder: Path, name: str, *, channels: int, steps: int = 16, **task: Any) -> Job:
    return parse_job(
        {
            "run": {
                "id": name,
                "directory": str(folder),
                "steps": steps,
                "seed": ord(name[0]),
                "device": "cpu",
                "threads_per_rank": 1,
            },
            "task": {"name": "digits", "channels": channels, **task},
            "batch": {"global_batch_size": 64},
            "optimizer": {"name": "adam", "learning_rate": 5e-3},
            "averaged_weights": {"decay": 0.7},
            "checkpoint": {"every_steps": 4, "keep": 3, "keep_best": 0},
            "evaluation": {"every_steps": 100},
            "noise_scale": {"enabled": False},
            "transport": {"timeout_seconds": 30.0},
            "metrics": {"enabled": False},
        }
    )


def trained(rank: int, world_size: int, store_address: str, jobs: Sequence[Job]) -> None:
    for number, job in enumerate(jobs):
        with agent_environment(store_address), contextlib.redirect_stdout(io.StringIO()):
            run.train(job, Topology(rank, world_size, rank, world_size, launcher="torchrun", restarts=number))


def ensembled(
    rank: int, world_size: int, store_address: str, requests: Sequence[tuple[Request, Distil | None]]
) -> list[dict[str, Any] | tuple[str, str]]:
    """What rank 0 prints for each request, or the error that it ends with."""
    found: list[Any] = []
    for number, (request, student) in enumerate(requests):
        here = Topology(rank, world_size, rank, world_size, launcher="torchrun", restarts=number)  # an own store each
        printed = io.StringIO()
        try:
            with (
                agent_environment(store_address),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                make_ensemble(request, student, here, as_json=True)
            found.append(json.loads(printed.getvalue()) if rank == 0 else {})
        except DdpError as error:
            found.append((type(error).__name__, str(error)))
    return found


@pytest.fixture(scope="module")
def runs(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on two ranks, of which one has another architecture."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [digits(folder, name, channels=channels) for name, channels in CHANNELS.items()]
    quadratic = parse_job(
        {**jobs[0].model_dump(exclude_none=True), "task": {"name": "quadratic"}, "evaluation": {"metric": "loss"}}
    )
    section = quadratic.run.model_copy(update={"id": "quadratic"})
    rank_pool.run(2, trained, [*jobs, quadratic.model_copy(update={"run": section})], timeout=120.0)
    return folder


def networks(folder: Path, names: str, *, averaged: bool = False) -> list[nn.Module]:
    """The members in float64, by the export and torch's own load_state_dict."""
    loaded: list[nn.Module] = []
    for name in names:
        path = checkpoint.newest(folder / name / "checkpoints")
        assert path is not None
        loaded.append(network(path, CHANNELS[name], averaged=averaged))
    return loaded


def network(path: Path, channels: int, *, averaged: bool = False) -> nn.Module:
    module = DigitsTask(DigitsSection(name="digits", channels=channels)).model()
    module.load_state_dict(model_state(path, checkpoint.read_manifest(path), averaged=averaged))
    return module.double().eval()


def validation() -> tuple[Tensor, Tensor]:
    _, examples = DigitsTask(DigitsSection(name="digits")).datasets()
    images, labels = examples.tensors
    return images.double(), labels


def by_loop(
    modules: Sequence[nn.Module], weights: Sequence[float] | None = None
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """(loss, accuracy) of each, and of the mean of their probabilities."""
    images, labels = validation()
    shares = weights or [1 / len(modules)] * len(modules)
    mean = torch.zeros(len(labels), 10, dtype=torch.float64)
    each: list[tuple[float, float]] = []
    with torch.no_grad():
        for module, share in zip(modules, shares, strict=True):
            logits = module(images)
            mean += share * logits.softmax(dim=1)
            each.append((float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())))
    right = (mean.argmax(1) == labels).double().mean()
    return each, (float(-mean[torch.arange(len(labels)), labels].log().mean()), float(right))


def pairs(found: dict[str, Any]) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    def pair(row: dict[str, Any]) -> tuple[float, float]:
        return row["loss"], row["accuracy"]

    return [pair(each) for each in found["members"]], pair(found["ensemble"])


def test_members_and_ensemble_are_those_of_a_loop_at_any_number_of_ranks(rank_pool: RankPool, runs: Path) -> None:
    everyone = [runs / name for name in CHANNELS]
    requests = [
        (Request(everyone), None),
        (Request(everyone[:2], weights=[3.0, 1.0], averaged=True), None),
        (Request([], runs=[runs / "a"], average_weights=True), None),
        (Request([runs / "a", runs / "quadratic"]), None),
    ]
    expected = [by_loop(networks(runs, "abc")), by_loop(networks(runs, "ab", averaged=True), [0.75, 0.25])]
    snapshots = [network(each, 4) for each in sorted((runs / "a" / "checkpoints").glob("step-*"))]
    expected.append(by_loop(snapshots))
    soup = by_loop([averaged_by_torch(snapshots)])[0][0]
    for world_size in (1, 2, 3):
        found: list[Any] = rank_pool.run(world_size, ensembled, requests, timeout=120.0)[0]
        for mine, (members, whole) in zip(found[:3], expected, strict=True):
            assert mine["examples"] == 325 and mine["combined"] == "probabilities"
            assert torch.allclose(torch.tensor(pairs(mine)[0]), torch.tensor(members), rtol=1e-5)
            assert pairs(mine)[1] == pytest.approx(whole, rel=1e-5)
        assert [each["name"] for each in found[0]["members"]] == ["a", "b", "c"]
        assert [each["name"] for each in found[2]["members"]] == ["a 8", "a 12", "a 16"]
        mixed = found[2]["averaged_weights"]
        assert mixed["loss"] == pytest.approx(soup[0], rel=1e-4) and mixed["accuracy"] == pytest.approx(
            soup[1], abs=1 / 325
        )
        assert found[3][0] == "UsageError" and "different tasks" in found[3][1]


def averaged_by_torch(modules: Sequence[nn.Module]) -> nn.Module:
    """The mean of the weights, with torch's own update_bn over the batches that the ranks share out."""
    import numpy as np

    result = network_like(modules[0])
    with torch.no_grad():
        for name, target in result.named_parameters():
            target.copy_(torch.stack([dict(each.named_parameters())[name] for each in modules]).mean(dim=0))
    images, _ = DigitsTask(DigitsSection(name="digits")).datasets()[0].tensors
    order = np.random.default_rng(0).permutation(len(images))
    batches = [images[order[part.start : part.stop]].double() for part in split(range(len(images)), len(images) // 64)]
    update_bn(batches, result)
    return result.eval()


def network_like(module: nn.Module) -> nn.Module:
    result = DigitsTask(DigitsSection(name="digits", channels=4)).model().double()
    result.load_state_dict(module.state_dict())
    return result


def frozen_statistics(rank: int, world_size: int, store_address: str) -> tuple[Tensor, Tensor]:
    with process_group(rank, world_size, store_address):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        nn.init.constant_(cast(Any, module[0]).running_mean, 7.0)
        freeze_(module, ["0.*"])
        examples = TensorExamples(torch.arange(80.0).view(40, 2))
        device = torch.device("cpu")
        recompute_statistics(module, lambda batch: module(batch[0]), examples, batch_size=8, device=device)
        return tuple(cast(Any, module[number]).running_mean for number in (0, 1))  # type: ignore[return-value]


def test_frozen_layers_keep_their_statistics_in_an_average_of_weights(rank_pool: RankPool) -> None:
    for frozen, other in rank_pool.run(2, frozen_statistics):
        assert torch.equal(frozen, torch.full((2,), 7.0))
        torch.testing.assert_close(other, torch.tensor([32.0, 33.0]), rtol=1e-4, atol=0.0)


def test_a_damaged_member_is_one_message_on_all_ranks(rank_pool: RankPool, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    newest = checkpoint.newest(tmp_path / "a" / "checkpoints")
    assert newest is not None
    os.truncate(newest / "shared.safetensors", 100)
    requests = [(Request([newest, runs / "b"]), None), (Request([runs / "a", runs / "b"], weights=[1.0]), None)]
    for answers in rank_pool.run(2, ensembled, requests):
        assert answers[0][0] == "CheckpointError" and "shared.safetensors" in answers[0][1]
        assert answers[1] == ("UsageError", "--weights: 1 numbers for 2 members")


def test_a_student_is_a_run_that_is_recorded_and_resumed(rank_pool: RankPool, runs: Path, tmp_path: Path) -> None:
    members = [runs / "a", runs / "b"]
    job = digits(tmp_path, "student", channels=3, steps=20)
    longer = digits(tmp_path, "student", channels=3, steps=30)
    requests = [(Request(members), Distil(job)), (Request(members), Distil(longer, resume="auto"))]
    first, second = rank_pool.run(2, ensembled, requests, timeout=120.0)[0]
    assert first["student"]["name"] == "student student" and first["student"]["accuracy"] > 0.15
    assert second["student"]["accuracy"] >= 0.2
    assert [step.step for step in steps_of(tmp_path / "student")] == list(range(1, 31))
    options = cast("Any", load_job(tmp_path / "student" / "job.toml").task).options
    assert options["task"]["channels"] == 3 and len(options["members"]) == 2 and options["temperature"] == 2.0


def test_the_log_of_the_mean_of_probabilities_is_normalised_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(7, 5, 3, dtype=torch.float64, generator=generator) * 4 for _ in range(3)]
    weights, temperature = [0.5, 0.0, 0.5], 3.0
    for dimension in (1, -1):
        mean = sum(w * (z / temperature).softmax(dimension) for w, z in zip(weights, logits, strict=True))
        assert isinstance(mean, Tensor)
        found = log_mean_probabilities(logits, weights, dimension, temperature)
        torch.testing.assert_close(found.exp(), mean)
        torch.testing.assert_close(found.softmax(dimension), mean)
    found = log_mean_probabilities(logits, weights, "binary", temperature)
    torch.testing.assert_close(found.sigmoid(), ((logits[0] / 3).sigmoid() + (logits[2] / 3).sigmoid()) / 2)
    assert log_mean_probabilities([logits[0].bfloat16()], [1.0], 1).dtype == torch.float32


@dataclass(frozen=True)
class Several:
    """As models of transformers answer."""

    logits: Tensor
    text: str


def test_values_are_averaged_as_they_are_and_mappings_by_their_keys() -> None:
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])
    assert combine([one, other], [0.25, 0.75], None).tolist() == [[2.5], [5.0]]
    logits = [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])]
    both = combine(
        [{"logits": z, "hidden": v, "n": 3} for z, v in zip(logits, (one, other), strict=True)], [0.5, 0.5], 1
    )
    torch.testing.assert_close(both["logits"].exp(), (logits[0].softmax(1) + logits[1].softmax(1)) / 2)
    several = combine([Several(z, "x") for z in logits], [0.5, 0.5], 1)
    assert torch.equal(several.logits, both["logits"]) and several.text == "x"
    assert both["hidden"].tolist() == [[2.0], [4.0]] and both["n"] == 3
    with pytest.raises(UsageError, match="different shapes"):
        combine([one, one[:1]], [0.5, 0.5], None)
    with pytest.raises(UsageError, match="its model's dict has no logits"):
        combine([{"scores": each} for each in logits], [0.5, 0.5], 1)
    with pytest.raises(UsageError, match="answers with a str"):
        combine(["a", "b"], [0.5, 0.5], None)


def test_a_member_computes_once_for_equal_inputs_while_that_is_asked() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return 2 * x

    module = Counting()
    whole = Ensemble([Member(module)], [1.0], None)
    x = torch.ones(2, 1)
    with whole.remembering():
        assert whole(x).tolist() == whole(x.clone()).tolist() == [[2.0], [2.0]]
        assert whole(x + 1).tolist() == [[4.0], [4.0]]
    whole(x)
    assert module.calls == 3


def test_a_member_in_low_precision_answers_in_float32() -> None:
    inputs, module = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), nn.Linear(3, 2)
    found = Member(module, PrecisionSection(dtype="bfloat16"))(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(inputs)
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())


def test_soft_targets_lose_what_torchs_divergence_says() -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(6, 9, generator=generator, requires_grad=True)
    teacher, temperature = torch.randn(6, 9, generator=generator).log_softmax(1), 4.0
    found = soft_loss(student, teacher, 1, temperature)
    expected = nn.KLDivLoss(reduction="batchmean", log_target=True)((student / temperature).log_softmax(1), teacher)
    torch.testing.assert_close(found.mean(), temperature**2 * expected)
    assert found.shape == (6,) and float(soft_loss(4 * teacher, teacher, 1, 4.0).abs().max()) < 1e-5
    positions = soft_loss(student.view(2, 3, 9), teacher.view(2, 3, 9), -1, temperature)
    torch.testing.assert_close(positions, found.view(2, 3).mean(dim=1))
    logit, target = student[:, :1], torch.randn(6, 1, generator=generator)
    two = [torch.cat([z, torch.zeros_like(z)], dim=1) for z in (logit, target * 4)]
    expected = soft_loss(two[0], (two[1] / 4).log_softmax(1), 1, 4.0)
    torch.testing.assert_close(soft_loss(logit, target, "binary", 4.0), expected)
    torch.testing.assert_close(soft_loss(student, teacher, None, 1.0), (student - teacher).square().mean(dim=1))
    one_each = soft_loss(student[:, 0], teacher[:, 0], None, 1.0)  # a model that squeezes its outputs
    torch.testing.assert_close(one_each, (student - teacher)[:, 0].square())


def test_a_student_has_its_tasks_labels(runs: Path) -> None:
    path = checkpoint.newest(runs / "a" / "checkpoints")
    assert path is not None
    student = Distillation(task={"name": "digits"}, members=[str(path)])
    plain = DigitsTask(DigitsSection(name="digits"))
    assert [hasattr(student, name) for name in OPTIONAL] == [hasattr(plain, name) for name in OPTIONAL]
    labelled = Distillation(
        task={"name": "test_ensemble:Labelled"}, members=[str(path)], allow_import=["test_ensemble"]
    )
    training, _ = labelled.datasets()
    assert labels_of(labelled, training, 3).tolist() == [2, 0, 1]


class Labelled(DigitsTask):
    """Its labels are told by the task."""

    def __init__(self) -> None:
        super().__init__(DigitsSection(name="digits"))

    def labels(self, dataset: Any) -> list[int]:
        return [2, 0, 1]


def test_data_are_the_same_where_examples_are() -> None:
    x = torch.arange(40.0).view(20, 2)
    assert fingerprint(TensorExamples(x)) == fingerprint(TensorExamples(x.clone()))
    assert fingerprint(TensorExamples(x)) != fingerprint(TensorExamples(x.double()))
    assert fingerprint(TensorExamples(x)) != fingerprint(TensorExamples(x + 1e-4))


def test_the_best_of_a_sweep(tmp_path: Path) -> None:
    trials = [
        {"stage": "few", "trial": f"trial-000{number}", "rank": rank} for number, rank in enumerate([None, 3, 1, 2])
    ]
    (tmp_path / "results.json").write_text(json.dumps({"trials": trials}))
    for number in (2, 3):
        (tmp_path / f"few/trial-000{number}/checkpoints/step-00000001").mkdir(parents=True)
    assert best_runs(tmp_path, 2) == [tmp_path / "few/trial-0002", tmp_path / "few/trial-0003"]
    with pytest.raises(UsageError, match="kept no checkpoint"):
        best_runs(tmp_path, 3)
    with pytest.raises(UsageError, match="3 ranked trials"):
        best_runs(tmp_path, 4)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UsageError, match="not a sweep's results"):
        best_runs(tmp_path, 1)
    with pytest.raises(UsageError, match="cannot read"):
        best_runs(tmp_path / "none", 1)


def test_the_command_says_what_it_lacks_and_what_it_found(runs: Path, tmp_path: Path) -> None:
    none = run_command(python("-m", "ddp", "ensemble"), tmp_path)
    assert none.code == 2 and none.stderr.startswith("error: no members")
    found = run_command(python("-m", "ddp", "ensemble", str(runs / "a"), str(runs / "c")), tmp_path)
    assert found.code == 0, found.stderr
    heading, _, *rows = found.stdout.splitlines()
    assert heading == "validation: 325 examples, 2 members, 1 rank(s)"
    assert [row.split("  ")[0] for row in rows[:4]] == ["a", "c", "mean of members", "ensemble"]
