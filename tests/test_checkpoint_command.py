"""`checkpoints` and `export`: what they print, write and refuse; an exported model is the live one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints import names, save
from ddp.checkpoint import Saver, find
from ddp.checkpoint.export import export
from ddp.checkpoint_command import checkpoints, in_lines, list_checkpoints
from ddp.checkpoint_command import export as export_command
from ddp.errors import CheckpointError, UsageError
from ddp.training.resume import find_origin
from ranks import RankPool
from training_runs import Misbehaving, job, train_one

COURSE = {"course": {"epoch": 3, "position": 50}, "counters": {"training_examples": 200}}


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ddp", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def _run(tmp_path: Path) -> Path:
    """A run with a good checkpoint of step 10 and 20, and a bad one of step 30."""
    for step, metric in ((10, ("accuracy", 0.25)), (20, ("accuracy", float("nan"))), (30, None)):
        save(tmp_path / "run" / "checkpoints", step, keep=9, shared=COURSE, metric=metric)
    os.truncate(tmp_path / "run/checkpoints/step-00000030/shared.safetensors", 3)
    return tmp_path / "run"


def test_checkpoints_are_listed_and_verified(tmp_path: Path) -> None:
    run = _run(tmp_path)
    done = _command("checkpoints", run)
    heading, bad, newest, older = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert heading.split() == ["step", "epoch", "metric", "size", "ranks", "age"]
    assert bad.split()[:2] == ["30", "-"] and "shared.safetensors: 3 bytes where" in bad
    assert newest.split()[:4] == ["20", "3.25", "accuracy", "nan"]
    assert newest.endswith("OK, the one that --resume auto takes")
    assert older.split()[:4] == ["10", "3.25", "accuracy", "0.25"] and older.endswith("  OK")
    table = json.loads(_command("checkpoints", run, "--json").stdout)
    assert [(each["step"], each["resumed"], each["value"]) for each in table] == [
        (30, False, None),
        (20, True, "nan"),
        (10, False, 0.25),
    ]
    assert [each.step for each in list_checkpoints(run / "checkpoints")] == [30, 20, 10]


def test_a_run_without_any_that_verifies_is_told_by_the_exit_code(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for step in (10, 20):
        (find(run / "checkpoints", step) / "manifest.json").unlink()
    done = _command("checkpoints", run)
    assert done.returncode == 1
    assert "none of its checkpoints verifies" in done.stderr and len(done.stdout.splitlines()) == 4
    (tmp_path / "empty").mkdir()
    done = _command("checkpoints", tmp_path / "empty")
    assert done.returncode == 1 and "no checkpoints" in done.stderr
    assert _command("checkpoints", tmp_path / "nothing").returncode == 2


def test_an_unknown_epoch_is_a_dash(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert in_lines(list_checkpoints(tmp_path)).splitlines()[1].split()[:3] == ["5", "-", "-"]


@pytest.mark.parametrize("where", ["link", "shared", "group"])
def test_what_resume_refuses_is_not_called_good(tmp_path: Path, where: str) -> None:
    run = _run(tmp_path)
    said = "may write to it"
    if where == "link":
        (run / "checkpoints").rename(tmp_path / "elsewhere")
        (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
        said = "is a link, which is not followed"
    else:
        run.chmod(0o777 if where == "shared" else 0o770)
    with pytest.raises(CheckpointError, match=said):
        checkpoints(run, as_json=True)
    with pytest.raises(CheckpointError, match=said):
        export_command(run, tmp_path / "model")
    for resume in ("auto", str(run)):
        with pytest.raises(UsageError, match=f"--resume: .*{said}"):
            find_origin(job(tmp_path), {}, resume, datetime.now(UTC), "abcd")
    if where == "shared":
        with pytest.raises(CheckpointError, match="every user may replace what is in it"):
            export_command(find(run / "checkpoints", 20), tmp_path / "model")


# --- export ---


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5))
    model[2].register_buffer("scratch", torch.ones(2), persistent=False)
    return model


def _save_model(directory: Path, models: list[torch.nn.Module], state_dict: dict[str, str] | None = None) -> Path:
    savers = [Saver(directory, rank=rank, world_size=len(models), keep=1) for rank in range(len(models))]
    for saver, model in zip(savers, models, strict=True):
        shared = {"parameters": dict(model.named_parameters()), "state_dict": state_dict}
        saver.begin(4, shared, {"buffers": dict(model.named_buffers())}, ("loss", 0.1234567))
    for saver in reversed(savers):
        path = saver.finish(lambda mine: [mine] * len(models))
        saver.close()
    return path


def test_running_statistics_are_means_and_counters_rank_0s(tmp_path: Path) -> None:
    models = [_model() for _ in range(3)]
    for rank, model in enumerate(models):
        for _ in range(rank + 1):
            model(torch.randn(9, 5) * (rank + 1))
    path = _save_model(tmp_path / "run" / "checkpoints", models)
    assert export(path, tmp_path / "model", rank_statistics=True) == 6 + 4 + 3 * 4
    state = load_file(tmp_path / "model")
    for name in ("1.running_mean", "1.running_var"):
        own = [model.get_buffer(name) for model in models]
        expected = sum(each.double() for each in own) / 3
        torch.testing.assert_close(state[name].double(), expected, rtol=1e-6, atol=0)
        for rank, each in enumerate(own):
            assert torch.equal(state[f"ranks.{rank:05d}.{name}"], each)
    assert state["1.num_batches_tracked"] == 1
    assert state["0.weight"].equal(models[0].get_parameter("0.weight"))
    with safe_open(tmp_path / "model", "pt") as file:
        texts = file.metadata()
    assert texts == {
        "format": "pt",
        "run": "run",
        "step": "4",
        "world_size": "3",
        "metric": "loss",
        "value": "0.1234567",
    }


def _train_and_keep(rank: int, world_size: int, store_address: str, here: Any) -> dict[str, torch.Tensor]:
    ended = train_one(rank, world_size, store_address, [here] * world_size, None)
    assert ended.kind == "", ended.message
    model = Misbehaving.last_model
    assert model is not None
    return model.state_dict()


def test_the_exported_model_is_the_one_that_was_trained(rank_pool: RankPool, tmp_path: Path) -> None:
    live = rank_pool.run(2, _train_and_keep, job(tmp_path, run__steps=4))[0]
    target = tmp_path / "model.safetensors"
    done = _command("export", tmp_path / "run", target)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: 4 tensors" in done.stdout
    state = load_file(target)
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    fresh.load_state_dict(state)
    assert state.keys() == live.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in live.items())
    assert oct(target.stat().st_mode & 0o777) == "0o600"


def test_tied_weights_and_buffers_that_are_not_kept_go_by_the_models_own_state(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5))
    model[2].weight = model[0].weight
    model[2].register_buffer("scratch", torch.ones(2), persistent=False)
    saved = {id(each): name for name, each in (*model.named_parameters(), *model.named_buffers())}
    held = {name: saved[id(each)] for name, each in model.state_dict(keep_vars=True).items()}
    export(_save_model(tmp_path / "run" / "checkpoints", [model], held), tmp_path / "model")
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5))
    fresh.load_state_dict(load_file(tmp_path / "model"))
    model.eval()
    fresh.eval()
    inputs = torch.randn(3, 5)
    assert torch.equal(model(inputs), fresh(inputs))


def test_what_is_there_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = _save_model(tmp_path / "run" / "checkpoints", [_model()])
    target = tmp_path / "out" / "model"
    with pytest.raises(CheckpointError, match=r"out/model: cannot be written|No such file"):
        export(path, target)
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(UsageError, match="out/model: exists already; give another name, or --force"):
        export(path, target)
    assert target.read_text() == "mine"
    export(path, target, overwrite=True)
    assert load_file(target)
    assert names(target.parent) == ["model"]


def test_a_checkpoint_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model that can be exported"):
        export(save(tmp_path, 1), tmp_path / "model")
    done = _command("export", tmp_path / "nothing", tmp_path / "model")
    assert done.returncode == 2 and "no such run directory" in done.stderr
    assert not (tmp_path / "model").exists()
