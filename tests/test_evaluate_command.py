"""`evaluate`: the run's own numbers at any number of ranks, from checkpoints and exported files; and clear refusals."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddp import checkpoint
from ddp.checkpoint.export import export
from ddp.errors import DdpError
from ddp.evaluate_command import Evaluated, evaluate_saved, in_words, to_json
from ddp.job import Job, load_job
from ddp.telemetry.recording import open_recording, read_evaluations
from ddp.telemetry.records import EvaluationRecord
from ddp.topology import Topology
from jobs import python, run_command
from ranks import RankPool
from training_runs import agent_environment, job, train_ranks

ROOT = Path(__file__).resolve().parent.parent
BOTH = ("training", "validation")
STEPS = 12


@pytest.fixture(scope="module")
def run(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits on three ranks, whose running statistics differ, evaluated and saved every four steps."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "task__name": "digits",
        "task__batch_norm": True,
        "run__steps": STEPS,
        "global_batch_size": 64,
        "micro_batch_size": 11,
        "optimizer__name": "adam",
        "optimizer__learning_rate": 0.01,
        "optimizer__weight_decay": 0.01,
        "averaged_weights__decay": 0.8,
        "evaluation__metric": "accuracy",
        "evaluation__every_steps": 4,
        "checkpoint__every_steps": 4,
        "checkpoint__keep": 10,
    }
    ended = train_ranks(rank_pool, 3, job(folder, **settings))
    assert [each.message for each in ended] == [""] * 3
    return folder / "run"


def _evaluate(rank: int, world_size: int, store_address: str, source: Path, of: Job, splits: Any, allow: Any) -> Any:
    """What `evaluate` comes to, or the error's type and message."""
    place = Topology(rank, world_size, rank, world_size, launcher="torchrun")
    with agent_environment(store_address):
        try:
            return evaluate_saved(source, of, place, splits=splits, allow_import=allow)
        except DdpError as error:
            return f"{type(error).__name__}: {error}"


def _recorded(run_directory: Path, step: int) -> dict[str, EvaluationRecord]:
    with contextlib.closing(open_recording(run_directory / "run.db")) as database:
        return {each.split: each for each in read_evaluations(database) if each.step == step}


def _assert_same(found: Evaluated, recorded: dict[str, EvaluationRecord]) -> None:
    assert {each.split for each in found.records} == recorded.keys()
    for each in found.records:
        before = recorded[each.split]
        assert (each.step, each.examples, each.epoch) == (before.step, before.examples, pytest.approx(before.epoch))
        assert each.loss == pytest.approx(before.loss, rel=1e-6)
        assert each.metrics == before.metrics, "counts are the very same"
        assert each.penalty == before.penalty and (each.penalty > 0) == (not each.split.endswith("averaged weights"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_runs_own_numbers_at_any_number_of_ranks(rank_pool: RankPool, run: Path, world_size: int) -> None:
    of = load_job(run / "job.toml")
    by_rank = rank_pool.run(world_size, _evaluate, run, of, BOTH, [])
    assert all(isinstance(each, Evaluated) for each in by_rank), by_rank
    for found in by_rank:
        assert found.recorded is not None and found.recorded[1] == found.recorded[2]
        assert [each.loss for each in found.records] == [each.loss for each in by_rank[0].records]
        _assert_same(found, _recorded(run, STEPS))


def test_the_very_same_bits_with_the_ranks_that_trained(rank_pool: RankPool, run: Path) -> None:
    found = rank_pool.run(3, _evaluate, run, load_job(run / "job.toml"), BOTH, [])[1]
    assert {each.split: each.loss for each in found.records} == {
        split: each.loss for split, each in _recorded(run, STEPS).items()
    }


def test_a_checkpoint_in_the_middle(rank_pool: RankPool, run: Path) -> None:
    path = checkpoint.find(run / "checkpoints", 4)
    (found,) = rank_pool.run(1, _evaluate, path, load_job(run / "job.toml"), BOTH, [])
    _assert_same(found, _recorded(run, 4))
    assert "step 4, epoch 0.17, written by 3 rank(s), evaluated by 1" in in_words(found)
    assert "the same" in in_words(found)


def test_an_exported_file_is_the_checkpoint(rank_pool: RankPool, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    export(checkpoint.find(run / "checkpoints", STEPS), file, rank_statistics=True)
    (found,) = rank_pool.run(1, _evaluate, file, load_job(run / "job.toml"), ["validation"], [])
    (record,) = found.records
    before = _recorded(run, STEPS)["validation"]
    assert (record.loss, record.metrics) == (pytest.approx(before.loss, rel=1e-6), before.metrics)
    assert to_json(found)["step"] == STEPS and to_json(found)["epoch"] is None


def test_what_cannot_be_evaluated_is_one_clear_message_on_all_ranks(
    rank_pool: RankPool, run: Path, tmp_path: Path
) -> None:
    of = load_job(run / "job.toml")
    other = load_job(run / "job.toml", ["task.channels=5"])
    custom = job(tmp_path)
    damaged = shutil.copytree(run, tmp_path / "damaged", copy_function=shutil.copy2)
    path = checkpoint.find(damaged / "checkpoints", STEPS)
    part = path / "rank-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    text = tmp_path / "model.safetensors"
    text.write_text("no tensors")
    for source, job_of, words in (
        (run, other, "CheckpointError: .*belongs to another model: parameter 0.weight .* give the job"),
        (path, of, "CheckpointError: .*rank-00002.safetensors"),
        (text, of, "CheckpointError: .*not a whole safetensors file"),
        (run, custom, "UsageError: .*--allow-import training_runs"),
        (tmp_path / "none", of, "UsageError: .*no such"),
    ):
        answers = rank_pool.run(2, _evaluate, source, job_of, BOTH, [])
        assert all(isinstance(each, str) for each in answers), answers
        assert answers[0] == answers[1]
        assert re.match(words, answers[0], re.DOTALL), answers[0]
    (older,) = rank_pool.run(1, _evaluate, damaged, of, BOTH, [])
    assert older.records[0].step == 8, "of a run the newest that verifies"


def test_the_command(run: Path, tmp_path: Path) -> None:
    ended = run_command(python("-m", "ddp", "evaluate", str(run), "--split", "validation", "--json"), tmp_path)
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)
    before = _recorded(run, STEPS)
    names = ["validation", "validation, averaged weights"]
    assert [each["split"] for each in found["evaluations"]] == names
    for each in found["evaluations"]:
        assert each["metrics"] == before[each["split"]].metrics
    assert found["recorded"] == {"metric": "accuracy", "value": before["validation"].metrics["accuracy"]}
    moved = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    for arguments, words in (
        ([str(moved)], "give the job file of the run, --job JOB.toml"),
        ([str(tmp_path / "none")], "no such checkpoint or run"),
        ([str(run), "--split", "test"], "validation"),
    ):
        ended = run_command(python("-m", "ddp", "evaluate", *arguments), tmp_path)
        assert ended.code in (1, 2) and words in ended.stderr and "Traceback" not in ended.stderr


def _example(rank: int, world_size: int, store_address: str, run_directory: Path) -> list[str]:
    return runpy.run_path(str(ROOT / "examples" / "evaluate.py"))["lines"](run_directory)


def test_the_example_has_a_line_for_each_checkpoint(rank_pool: RankPool, run: Path) -> None:
    (lines,) = rank_pool.run(1, _example, run)
    assert [line.split()[:2] for line in lines] == [["step", "12"], ["step", "8"], ["step", "4"]]
    assert f"loss {_recorded(run, 4)['validation'].loss:.4f}" in lines[-1]
