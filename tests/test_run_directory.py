"""Run directories: private, one run each, reopened only to resume with the same numbers, gone if a run never began."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import CheckpointError, JobFileError, UsageError
from ddp.job import Job, load_job, parse_job
from ddp.training.run_directory import (
    WRITTEN,
    WRITTEN_FOLDERS,
    RunDirectory,
    changed_settings,
    discarded_on_usage_error,
    open_run_directory,
)
from jobs import python, run_command
from ranks import RankPool


def _job(directory: Path, **sections: dict[str, Any]) -> Job:
    table: dict[str, Any] = {
        "run": {"epochs": 1, "directory": str(directory)},
        "task": {"name": "digits"},
        "batch": {"global_batch_size": 64, "micro_batch_size": 32},
    }
    return parse_job({key: table.get(key, {}) | sections.get(key, {}) for key in (*table, *sections)})


def _mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_run_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    runs = tmp_path / "deep" / "runs"
    before = os.umask(umask)
    try:
        run = open_run_directory(_job(runs), "first", resume=False)
    finally:
        os.umask(before)
    assert run.path == runs / "first"
    assert run.path.name == "first"
    assert not run.reopened
    assert (_mode(runs), _mode(run.path), _mode(run.job_file)) == ("0o755", "0o700", "0o600")
    assert load_job(run.job_file) == _job(runs)
    run.close()


@pytest.mark.parametrize("run_id", ["", "a/b", "..", ".hidden", "a b", "x" * 65])
def test_an_id_that_is_no_file_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(UsageError, match=r"run.id: .* is not a run id"):
        open_run_directory(_job(tmp_path / "runs"), run_id, resume=False)
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_opened_again_only_to_resume_it(tmp_path: Path) -> None:
    job = _job(tmp_path)
    open_run_directory(job, "one", resume=False).close()
    (tmp_path / "one" / "run.db").write_text("kept")
    with pytest.raises(UsageError, match=r"one exists: continue that run with --resume auto, or choose another run.id"):
        open_run_directory(job, "one", resume=False)
    run = open_run_directory(job, "one", resume=True)
    assert run.reopened
    assert (run.path / "run.db").read_text() == "kept"
    run.close()


def test_resume_of_a_run_that_is_not_there_makes_it(tmp_path: Path) -> None:
    run = open_run_directory(_job(tmp_path), "new", resume=True)
    assert not run.reopened
    assert run.job_file.exists()
    run.close()


def test_a_resumed_run_may_be_longer_but_not_another(tmp_path: Path) -> None:
    open_run_directory(_job(tmp_path), "one", resume=False).close()
    longer = _job(tmp_path, run={"epochs": 9}, metrics={"port": 9999}, checkpoint={"keep": 7})
    open_run_directory(longer, "one", resume=True).close()
    assert load_job(tmp_path / "one" / "job.toml") == longer
    other = _job(tmp_path, run={"seed": 5}, batch={"global_batch_size": 128}, optimizer={"name": "sgd"})
    with pytest.raises(UsageError) as refused:
        open_run_directory(other, "one", resume=True)
    for line in ("run.seed: 0 -> 5", "batch.global_batch_size: 64 -> 128", "optimizer.name: 'adamw' -> 'sgd'"):
        assert f"  {line}" in str(refused.value)
    assert load_job(tmp_path / "one" / "job.toml") == longer
    open_run_directory(longer, "one", resume=True).close()  # the refusal holds no lock


def test_what_may_change(tmp_path: Path) -> None:
    before = _job(tmp_path)
    assert changed_settings(before, _job(tmp_path / "elsewhere", run={"id": "x", "epochs": None, "steps": 9})) == []
    assert changed_settings(before, _job(tmp_path, transport={"name": "c10d"}, evaluation={"target": 0.5})) == []
    assert changed_settings(before, _job(tmp_path, task={"batch_norm": False})) == ["task.batch_norm: True -> False"]
    assert changed_settings(before, _job(tmp_path, task={"name": "text"}))[0] == "task.name: 'digits' -> 'text'"


def test_a_job_file_that_a_kill_never_let_be_written_is_written_now(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir(0o700)
    (tmp_path / "one" / ".job.toml.partial").write_text("[ru")
    open_run_directory(_job(tmp_path), "one", resume=True).close()
    assert load_job(tmp_path / "one" / "job.toml") == _job(tmp_path)
    assert not (tmp_path / "one" / ".job.toml.partial").exists()
    (tmp_path / "one" / "job.toml").write_text("[run")
    with pytest.raises(JobFileError, match=r"one/job.toml: not valid TOML"):
        open_run_directory(_job(tmp_path), "one", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_links_files_and_open_directories_are_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("link", "dangling", "file"):
        with pytest.raises(UsageError, match=f"{name} is not a directory"):
            open_run_directory(_job(tmp_path), name, resume=resume)
    with pytest.raises(UsageError, match="open: every user may write to it"):
        open_run_directory(_job(tmp_path), "open", resume=resume)
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"run.directory: cannot make .*/file/one: Not a directory"):
        open_run_directory(_job(tmp_path / "file"), "one", resume=False)


def _try_to_open(rank: int, world_size: int, store_address: str, directory: str) -> str:
    try:
        open_run_directory(_job(Path(directory)), "one", resume=True).close()
    except UsageError as error:
        return str(error)
    return "opened"


def test_a_run_in_progress_is_not_opened_by_another_process(rank_pool: RankPool, tmp_path: Path) -> None:
    run = open_run_directory(_job(tmp_path), "one", resume=False)
    (answer,) = rank_pool.run(1, _try_to_open, str(tmp_path))
    assert "one is in use by a run that has not ended" in answer
    run.close()
    assert rank_pool.run(1, _try_to_open, str(tmp_path)) == ["opened"]


# --- nothing left behind ---


def test_a_usage_error_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    run = open_run_directory(_job(tmp_path / "deep" / "runs"), "one", resume=False)
    with pytest.raises(UsageError, match="port"), discarded_on_usage_error(run):
        run.checkpoints.mkdir()
        run.targets.mkdir()
        raise UsageError("port in use")
    assert list(tmp_path.iterdir()) == []


def test_what_others_made_stays(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = open_run_directory(_job(runs), "first", resume=False)
    second = open_run_directory(_job(runs), "second", resume=False)
    first.targets.mkdir()
    (first.targets / "second.json").touch()
    first.discard()
    assert sorted(path.name for path in runs.iterdir()) == ["second", "targets"]
    second.discard()  # it did not make `runs`
    assert [path.name for path in runs.iterdir()] == ["targets"]


def test_a_reopened_run_and_other_errors_leave_it_all(tmp_path: Path) -> None:
    made = open_run_directory(_job(tmp_path), "one", resume=False)
    with pytest.raises(CheckpointError), discarded_on_usage_error(made):
        raise CheckpointError("later")
    made.close()
    reopened = open_run_directory(_job(tmp_path), "one", resume=True)
    with pytest.raises(UsageError), discarded_on_usage_error(reopened):
        raise UsageError("port in use")
    assert RunDirectory(tmp_path / "one").job_file.exists()


# --- links and owners ---


@pytest.mark.parametrize("name", WRITTEN)
def test_no_link_in_a_run_is_followed(tmp_path: Path, name: str) -> None:
    open_run_directory(_job(tmp_path / "runs"), "one", resume=False).close()
    victim = tmp_path / "victim"
    if name in WRITTEN_FOLDERS:
        victim.mkdir()
    else:
        victim.write_text("precious")
    for target in (victim, tmp_path / "nowhere"):
        place = tmp_path / "runs" / "one" / name
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        with pytest.raises(UsageError, match=f"one/{name} is a link, which is not followed"):
            open_run_directory(_job(tmp_path / "runs"), "one", resume=True)
    assert not (tmp_path / "nowhere").exists()
    assert list(victim.iterdir()) == [] if name in WRITTEN_FOLDERS else victim.read_text() == "precious"


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    open_run_directory(_job(tmp_path), "one", resume=False).close()
    os.mkfifo(tmp_path / "one" / "run.db")
    with pytest.raises(UsageError, match="run.db is no plain file"):
        open_run_directory(_job(tmp_path), "one", resume=True)


def test_a_run_that_its_group_may_change_is_refused(tmp_path: Path) -> None:
    open_run_directory(_job(tmp_path), "one", resume=False).close()
    (tmp_path / "one").chmod(0o770)
    with pytest.raises(UsageError, match="its group may write to it; make it yours alone"):
        open_run_directory(_job(tmp_path), "one", resume=True)


def test_all_that_a_run_leaves_is_its_owners_alone(tmp_path: Path) -> None:
    """A real run, from a shell that shares everything; the folder of target lists stays open to Prometheus' user."""
    (tmp_path / "job.toml").write_text(
        '[run]\nsteps = 3\nid = "run"\n[task]\nname = "quadratic"\n[batch]\nglobal_batch_size = 8\n'
        '[evaluation]\nmetric = "distance"\n'
    )
    before = os.umask(0)
    try:
        ended = run_command(python("-m", "ddp", "train", "job.toml"), tmp_path)
    finally:
        os.umask(before)
    assert ended.code == 0, ended
    run = tmp_path / "runs" / "run"
    assert (_mode(tmp_path / "runs"), _mode(tmp_path / "runs" / "targets"), _mode(run)) == ("0o755", "0o755", "0o700")
    modes = {str(path.relative_to(run)): path.stat().st_mode & 0o077 for path in run.rglob("*")}
    assert {"run.db", "outcome.json", "job.toml"} <= modes.keys()
    assert {name for name, mode in modes.items() if mode} == set()
