from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from ddp.job import load_job, parse_job
from ddp.topology import SINGLE_PROCESS, Topology
from jobs import beside_python, finish, python, run_command, started, wait_until, write_job
from launch.__main__ import worker_arguments

TRAIN = ["-m", "ddp", "train", "job.toml"]
ALLOWED = ["--allow-import", "misbehaving"]
TORCHRUN = [*python("-m", "torch.distributed.run"), "--standalone", "--nproc-per-node=2"]
MPIRUN = [beside_python("mpirun"), "-n", "2"]

BAD_JOBS = {
    "unknown key": (["--set", "run.epoch=3"], ["run.epoch: unknown key", "did you mean epochs?"]),
    "unknown value": (["--set", "transport.name=smoke"], ["transport.name: 'smoke' is not valid", "shared_memory"]),
    "wrong type": (["--set", 'run.seed="one"'], ["run.seed: should be a valid integer"]),
    "batch not positive": (["--set", "batch.global_batch_size=0"], ["batch.global_batch_size", "greater than 0"]),
    "run id with a slash": (["--set", "run.id=a/b"], ["run.id: 'a/b' is not a run id"]),
    "run id that climbs": (["--set", 'run.id=".."'], ["run.id: '..' is not a run id"]),
    "not section.key=value": (["--set", "epochs"], ["--set epochs: write section.key=value"]),
    "unknown option": (["--sett", "x"], ["No such option: --sett"]),
}


@pytest.mark.parametrize("program", ["ddp", "launch"])
@pytest.mark.parametrize("options, said", BAD_JOBS.values(), ids=BAD_JOBS.keys())
def test_a_bad_job_is_one_message_and_code_2(tmp_path: Path, program: str, options: list[str], said: list[str]) -> None:
    write_job(tmp_path)
    command = python(*TRAIN) if program == "ddp" else python("-m", "launch", "torchrun", "job.toml")
    before = set(tmp_path.iterdir())
    ended = run_command([*command, *options], tmp_path, timeout=30)
    assert ended.code == 2, ended
    assert not ended.stdout
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(part in ended.stderr for part in said), ended.stderr
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("text, said", [(None, "cannot read the job file"), ("[run", "not valid TOML")])
@pytest.mark.parametrize("command", [python(*TRAIN), python("-m", "launch", "mpirun", "job.toml")])
def test_a_file_that_is_no_job(tmp_path: Path, command: list[str], text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "job.toml").write_text(text)
    ended = run_command(command, tmp_path, timeout=30)
    assert (ended.code, ended.stderr.count("\n")) == (2, 1), ended
    assert f"job.toml: {said}" in ended.stderr


def test_an_error_that_only_the_ranks_can_find_comes_back_through_launch(tmp_path: Path) -> None:
    write_job(tmp_path)
    settings = ["--set", "task.name=misbehaving:Nothing", "--allow-import", "misbehaving"]
    for launcher in ("torchrun", "mpirun"):
        ended = run_command(python("-m", "launch", launcher, "job.toml", "--nproc-per-node", "2", *settings), tmp_path)
        assert ended.code == 2, ended
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert "has no attribute 'Nothing'" in ended.stderr
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [TRAIN, ["-m", "launch", "torchrun", "job.toml"]])
def test_what_only_the_command_line_may_allow(tmp_path: Path, command: list[str]) -> None:
    write_job(tmp_path)
    told = (
        ([], "give --allow-import misbehaving to allow it"),
        (
            ["--allow-import", "misbehaving.task", "--allow-import", "misbehav"],
            "give --allow-import misbehaving to allow",
        ),
        (["--allow-import", ""], "--allow-import : not a module's name"),
        (["--allow-import", "job.toml/"], "--allow-import job.toml/: not a module's name"),
        (
            ["--allow-import", "misbehaving", "--set", "metrics.enabled=true", "--set", "metrics.host=0.0.0.0"],
            "--insecure",
        ),
    )
    for options, message in told:
        ended = run_command(python(*command, *options), tmp_path, timeout=30)
        assert (ended.code, ended.stderr.count("\n")) == (2, 1), ended
        assert message in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_on_rank_0_ends_all_ranks(tmp_path: Path) -> None:
    write_job(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = ["--set", "metrics.enabled=true", "--set", f"metrics.port={port}", "--allow-import", "misbehaving"]
        for command in (python(*TRAIN), python("-m", "launch", "torchrun", "job.toml", "--nproc-per-node", "2")):
            ended = run_command([*command, *settings], tmp_path)
            assert ended.code == 2, ended
            assert port in ended.stderr
            assert ended.stderr.count("error:") == 1, ended.stderr
            assert not (tmp_path / "runs" / "run").exists()


def test_a_missing_job_is_said_once_by_bare_ranks(tmp_path: Path) -> None:
    for launcher in (MPIRUN, TORCHRUN):
        worker = python(*TRAIN) if launcher is MPIRUN else TRAIN
        ended = run_command([*launcher, *worker], tmp_path)
        assert ended.code != 0
        assert ended.stderr.count("cannot read the job file") == 1, ended.stderr
        if launcher is MPIRUN:
            assert ended.code == 2


def test_a_missing_job_is_said_once_over_restarts(tmp_path: Path) -> None:
    ended = run_command([*TORCHRUN, "--max-restarts=2", *TRAIN], tmp_path)
    assert ended.code != 0
    assert ended.stderr.count("cannot read the job file") == 1, ended.stderr
    assert "exitcode  : 2 " in ended.stderr


@pytest.mark.parametrize("launcher", [[], TORCHRUN, MPIRUN], ids=["one process", "torchrun", "mpirun"])
def test_the_same_command_under_any_launcher(tmp_path: Path, launcher: list[str]) -> None:
    write_job(tmp_path, steps=2)
    worker = TRAIN if launcher is TORCHRUN else python(*TRAIN)
    ended = run_command([*launcher, *worker, "--allow-import", "misbehaving"], tmp_path)
    assert ended.code == 0, ended
    assert ended.stdout.count("2 steps") == 1
    assert (tmp_path / "runs" / "run" / "outcome.json").exists()


def test_a_dry_run_says_what_would_run_on_rank_0_alone(tmp_path: Path) -> None:
    write_job(tmp_path, steps=11)
    ended = run_command([*MPIRUN, *python(*TRAIN), "--set", "batch.micro_batch_size=2", "--dry-run"], tmp_path)
    assert ended.code == 0, ended
    assert ended.stdout.splitlines() == [
        "task misbehaving:Task, steps 11",
        "ranks 2 (openmpi, 2 on this node)",
        "global_batch_size 6, micro_batch_size 2, gradient_accumulation_steps 2",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_a_batch_smaller_than_the_ranks(tmp_path: Path) -> None:
    write_job(tmp_path)
    place = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "16"}
    here = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [*python(*TRAIN), "--set", "batch.global_batch_size=8", "--dry-run"]
    ended = run_command(command, tmp_path, here, timeout=30)
    assert (ended.code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended
    assert "batch.global_batch_size: 8 examples a step are fewer than the 16 ranks" in ended.stderr


def test_accumulation_rounds_up() -> None:
    from ddp.__main__ import plan

    job = parse_job({"run": {"epochs": 3}, "task": {"name": "digits"}, "batch": {"global_batch_size": 64, "micro_batch_size": 7}})  # fmt: skip
    assert "gradient_accumulation_steps 10" in plan(job, SINGLE_PROCESS)
    assert "gradient_accumulation_steps 4" in plan(job, Topology(0, 3, 0, 3, launcher="torchrun"))
    assert "epochs 3" in plan(job, SINGLE_PROCESS)


def test_the_printed_job_is_the_job(tmp_path: Path) -> None:
    write_job(tmp_path)
    ended = run_command([*python(*TRAIN), "--set", "run.seed=5", "--print-config"], tmp_path, timeout=30)
    (tmp_path / "printed.toml").write_text(ended.stdout)
    assert load_job(tmp_path / "printed.toml") == load_job(tmp_path / "job.toml", ["run.seed=5"])


def write_digits(folder: Path, steps: int) -> None:
    batch = "[batch]\nglobal_batch_size = 32\nmicro_batch_size = 32"
    run = f'[run]\nsteps = {steps}\nid = "run"\ndevice = "cpu"'
    (folder / "job.toml").write_text(f'{run}\n[task]\nname = "digits"\n{batch}\n[metrics]\nenabled = false\n')


@pytest.mark.parametrize("delay_seconds", [0.0, 0.3, 0.8, 1.6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_at_any_time_after_the_start_stops_cleanly(
    tmp_path: Path, number: signal.Signals, delay_seconds: float
) -> None:
    """While Python imports torch, while the run is opened, in the first steps: whatever the delay meets."""
    write_digits(tmp_path, steps=1_000_000)
    with started(python(*TRAIN), tmp_path) as process:
        wait_until(lambda: catches(process.pid, number))
        time.sleep(delay_seconds)
        process.send_signal(number)
        ended = finish(process, timeout=60)
    assert ended.code == 75, ended
    assert "Traceback" not in ended.stderr and f"stopped by {number.name}" in ended.stderr.splitlines()[-1]


def catches(process_id: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    (caught,) = (
        line.split()[1]
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    )
    return bool(int(caught, 16) >> (number - 1) & 1)


def assert_finished(folder: Path) -> None:
    assert '"code": 0' in (folder / "runs" / "run" / "outcome.json").read_text()
    assert len(list((folder / "runs" / "run" / "checkpoints").glob("step-00000002*/manifest.json"))) == 1


def test_a_terminal_without_some_characters_does_not_fail_a_run(tmp_path: Path) -> None:
    write_digits(tmp_path, steps=2)
    name = "r\u00e4nne"
    where = ["--set", f"run.directory={name}"]
    ended = run_command([*python(*TRAIN), *where], tmp_path, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"})
    assert ended.code == 0, ended
    assert "2 steps" in ended.stdout and "r?nne/run/report.html" in ended.stdout
    (tmp_path / name).rename(tmp_path / "runs")
    assert_finished(tmp_path)


def test_a_closed_pipe_does_not_fail_a_finished_run(tmp_path: Path) -> None:
    write_digits(tmp_path, steps=2)
    ended = run_command(["bash", "-o", "pipefail", "-c", '"$@" | true', "bash", *python(*TRAIN)], tmp_path)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.stderr and "Broken pipe" not in ended.stderr
    assert_finished(tmp_path)


NO_TORCH = """
import shutil
import sys
from {module}.__main__ import main
try: main({arguments!r})
except SystemExit as end: print(end.code, "torch" in sys.modules, "numba" in sys.modules)
"""


@pytest.mark.parametrize(
    "module, arguments, code",
    [
        ("launch", ["torchrun", "job.toml", "--dry-run"], 0),
        ("launch", ["mpirun", "missing.toml"], 2),
        ("ddp", ["train", "job.toml", "--dry-run"], 0),
        ("ddp", ["train", "missing.toml"], 2),
        ("ddp", ["--help"], 0),
    ],
)
def test_without_loading_torch(tmp_path: Path, module: str, arguments: list[str], code: int) -> None:
    write_job(tmp_path)
    ended = run_command(python("-c", NO_TORCH.format(module=module, arguments=arguments)), tmp_path, timeout=30)
    assert ended.stdout.splitlines()[-1] == f"{code} False False", ended


def test_launch_dry_run_prints_a_command_that_a_shell_can_run(tmp_path: Path) -> None:
    write_job(tmp_path)
    (tmp_path / "my job.toml").write_text((tmp_path / "job.toml").read_text())
    options = ["--nproc-per-node", "2", "--run-id", "12", "--allow-import", "misbehaving", "--dry-run"]
    for launcher in ("torchrun", "mpirun"):
        ended = run_command(python("-m", "launch", launcher, "my job.toml", *options), tmp_path, timeout=30)
        assert ended.code == 0, ended
        (line,) = ended.stdout.splitlines()
        assert "DDP_RUN_ID=12 " in line
        ran = run_command(["sh", "-c", f"{line} --dry-run"], tmp_path)
        assert ran.code == 0, ran
        assert "ranks 2 " in ran.stdout
    assert not (tmp_path / "runs").exists()


def test_the_worker_gets_all_that_launch_was_given() -> None:
    assert worker_arguments(Path("a.toml"), ["run.seed=3", "x.y=z"], "auto", ["misbehaving"]) == [
        *["-m", "ddp", "train", "a.toml", "--set", "run.seed=3", "--set", "x.y=z"],
        *["--resume", "auto", "--allow-import", "misbehaving"],
    ]


def test_a_run_that_saved_nothing_begins_again_and_says_so(tmp_path: Path) -> None:
    write_job(tmp_path, steps=3)
    command = python("-m", "ddp", "train", "job.toml", "--resume", "auto", *ALLOWED)
    first = run_command(command, tmp_path)
    assert (first.code, "begins" in first.stderr) == (0, False), first
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    again = run_command(command, tmp_path)
    assert again.code == 0, again
    assert again.stderr.count("runs/run has no checkpoint: the run begins at its first step again\n") == 1, again.stderr


def test_resume_auto_needs_a_run(tmp_path: Path) -> None:
    write_job(tmp_path)
    job = (tmp_path / "job.toml").read_text().replace('id = "run"', "")
    (tmp_path / "job.toml").write_text(job)
    ended = run_command(
        python("-m", "launch", "torchrun", "job.toml", "--resume", "auto", *ALLOWED), tmp_path, timeout=30
    )
    assert ended.code == 2
    assert "which run?" in ended.stderr
