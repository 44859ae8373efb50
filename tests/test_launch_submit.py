"""`submit` with small programs in place of a launcher: what it answers, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from ddp.outcome import Outcome, correct, read
from ddp.training.signals import STOP_SIGNALS
from jobs import finish, is_running, python, run_command, started, wait_until
from launch import mpirun, torchrun
from launch import submit as launch_submit
from launch.folder import PREFIX, private_folder, remove_stale
from launch.submit import conclude, core_count, free_port

SUBMIT = """
import signal, sys
from launch.submit import submit
signals = {signal.SIGTERM: signal.SIGUSR2, signal.SIGINT: signal.SIGUSR2, signal.SIGUSR1: signal.SIGUSR2}
sys.exit(submit([sys.executable, "-c", sys.argv[1]], {"COLOUR": "blue"}, signals, stop_seconds=float(sys.argv[2])))
"""

# Writes the ids of itself and of an orphan in a session of its own, both deaf to SIGTERM.
DEAF = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR2, lambda *_: open("asked", "w"))
middle = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True, stdout=subprocess.DEVNULL); print(p.pid)"
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('orphan-is-deaf', 'w'); time.sleep(120)"
orphan = subprocess.run([sys.executable, "-c", middle, deaf], stdout=subprocess.PIPE, text=True).stdout
while not os.path.exists("orphan-is-deaf"): time.sleep(0.01)
pathlib.Path("ids.new").write_text(f"{os.getpid()} {orphan}")
os.rename("ids.new", "ids")
"""


def submitted(program: str, stop_seconds: float = 60.0) -> list[str]:
    return python("-c", SUBMIT, program, str(stop_seconds))


def ids(folder: Path) -> list[int]:
    return [int(text) for text in (folder / "ids").read_text().split()]


@pytest.fixture
def folder(tmp_path: Path) -> Generator[Path]:
    """A working directory; what a failed test left running there is ended."""
    yield tmp_path
    if (tmp_path / "ids").exists():
        for process in ids(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def write(outcome: str, code: int) -> str:
    return f"import os, sys; open(os.environ['DDP_OUTCOME_FILE'], 'w').write('''{outcome}'''); sys.exit({code})"


def as_json(code: int) -> str:
    return (
        f'{{"code": {code}, "rank": 1, "world_size": 2, "host": "here", "step": 7, "cause": "why", '
        '"consequence": false, "lost_rank": null}'
    )


@pytest.mark.parametrize(
    "program, code, said",
    [
        (write(as_json(75), 0), 75, "rank 1 on here, step 7: why\n"),
        (write(as_json(3), 1), 3, "error: rank 1 on here, step 7: why\n"),
        (write(as_json(0), 0), 0, ""),
        (write("half an outco", 4), 1, "ended with code 4, and no rank said why"),
        ("import sys; sys.exit(75)", 75, "ended with code 75"),
        ("import os; os.kill(os.getpid(), 9)", 1, "ended with signal SIGKILL"),
        ("import os, sys; sys.exit(os.environ['COLOUR'] != 'blue')", 0, ""),
    ],
    ids=["stopped", "diverged", "done", "damaged", "code", "signal", "environment"],
)
def test_the_code_that_comes_back(tmp_path: Path, program: str, code: int, said: str) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    ended = run_command(submitted(program), tmp_path, {"TMPDIR": str(temporary)}, timeout=30)
    assert ended.code == code, ended
    assert said in ended.stderr if said else not ended.stderr
    assert not list(temporary.iterdir())


def test_a_rank_that_said_done_outweighs_what_a_late_signal_does_to_the_launcher() -> None:
    done = Outcome(0, 0, 2, "here", None, "done")
    assert conclude(done, 0, "mpirun") == 0
    assert conclude(done, -2, "torchrun") == 0
    assert conclude(None, -9, "mpirun") == 1
    assert conclude(None, 3, "mpirun") == 3


@pytest.mark.parametrize("speaks", [True, False], ids=["a rank said why", "no rank did"])
def test_the_launchers_own_words_are_shown_only_for_want_of_better(tmp_path: Path, speaks: bool) -> None:
    program = "import sys; print('noise', file=sys.stderr); " + (write(as_json(3), 1) if speaks else "sys.exit(1)")
    assert ("noise" in run_command(submitted(program), tmp_path, timeout=30).stderr) is not speaks


def test_a_stderr_that_is_a_file_keeps_its_order(tmp_path: Path) -> None:
    """As batch systems open it: not to append. What the launcher says is not in it, what ranks and shell say is."""
    rank = "open(os.environ['DDP_STDERR'], 'a').write('rank\\n')"
    program = f"import os, sys; print('noise', file=sys.stderr, flush=True); {rank}; " + write(as_json(3), 1)
    script = 'exec 2>log; echo before >&2; "$@"; echo after >&2'
    run_command(["sh", "-c", script, "sh", *submitted(program)], tmp_path, timeout=30)
    assert (tmp_path / "log").read_text() == "before\nrank\nerror: rank 1 on here, step 7: why\nafter\n"


def test_what_the_command_orphaned_is_ended_too(folder: Path) -> None:
    assert run_command(submitted(DEAF), folder, timeout=30).code == 0
    assert not any(is_running(process) for process in ids(folder))


def test_a_command_that_will_not_stop_is_killed_with_its_orphans(folder: Path) -> None:
    with started(submitted(DEAF + "time.sleep(120)", stop_seconds=1), folder) as process:
        wait_until((folder / "ids").exists, 30)
        process.send_signal(signal.SIGTERM)
        ended = finish(process, 30)
    assert ended.code == 1
    assert "SIGKILL" in ended.stderr
    assert not any(is_running(process) for process in ids(folder))


def test_a_second_interrupt_ends_it_at_once(folder: Path) -> None:
    with started(submitted(DEAF + "time.sleep(120)"), folder) as process:
        wait_until((folder / "ids").exists, 30)
        process.send_signal(signal.SIGINT)
        wait_until((folder / "asked").exists, 30)
        assert all(is_running(each) for each in (process.pid, *ids(folder)))
        process.send_signal(signal.SIGINT)
        ended = finish(process, 30)
    assert ended.code == 1
    assert not any(is_running(process) for process in ids(folder))


def test_a_signal_is_translated(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        "open('ready', 'w'); time.sleep(60)"
    )
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        (tmp_path / "ready").unlink(missing_ok=True)
        with started(submitted(program), tmp_path) as process:
            wait_until((tmp_path / "ready").exists, 30)
            process.send_signal(number)
            assert finish(process, 30).code == 75


def test_the_command_hears_of_our_death(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('heard', 'w'), sys.exit()))\n"
        "pathlib.Path('ids.new').write_text(str(os.getpid())); os.rename('ids.new', 'ids'); time.sleep(60)"
    )
    with started(submitted(program), tmp_path, {"TMPDIR": str(tmp_path)}) as process:
        wait_until((tmp_path / "ids").exists, 30)
        process.kill()
        wait_until((tmp_path / "heard").exists, 30)
    wait_until(lambda: not is_running(ids(tmp_path)[0]), 30)


def test_a_free_port_and_cores() -> None:
    assert 0 < free_port() < 65536


def test_a_free_port_is_none_that_the_system_gives_to_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        assert all(free_port() < given.getsockname()[1] for _ in range(20))


def test_a_free_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(launch_submit, "PORTS", range(port, port + 1))
        assert free_port() != port
    assert 0 < core_count() <= len(os.sched_getaffinity(0))


def test_what_the_shell_left_below_this_process_is_not_ended(tmp_path: Path) -> None:
    """As in a job script with `exec > >(tee log)`: the reader of the log is below launch, which did not start it."""
    command = shlex.join(submitted(write(as_json(3), 1)))
    script = f"exec 2> >(cat > log; echo read to the end >> log); exec {command}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=30, check=False)
    assert ended.returncode == 3
    wait_until(lambda: "read to the end" in (tmp_path / "log").read_text(), 10)
    assert "error: " in (tmp_path / "log").read_text()


def test_closed_streams_and_a_wrong_count_do_not_end_it_without_a_word(tmp_path: Path) -> None:
    quadratic = '[run]\nsteps = 2\nid = "run"\n[task]\nname = "quadratic"\n[batch]\nglobal_batch_size = 8\n'
    (tmp_path / "job.toml").write_text(f'{quadratic}[evaluation]\nmetric = "distance"\n[metrics]\nenabled = false\n')
    launch = python("-m", "launch", "torchrun", "job.toml")
    ended = run_command(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *launch], tmp_path)
    assert ended.code == 0, ended
    assert '"code": 0' in (tmp_path / "runs" / "run" / "outcome.json").read_text()
    ended = run_command(launch, tmp_path, {"DDP_RESTART_COUNT": "abc"}, timeout=30)
    assert ended.code == 2, ended
    assert ended.stderr == "error: DDP_RESTART_COUNT=abc is not a number of 0 or more: unset it\n"


@pytest.mark.parametrize("signals", [mpirun.SIGNALS, torchrun.SIGNALS], ids=["mpirun", "torchrun"])
def test_every_signal_that_stops_ranks_is_passed_on(signals: Mapping[int, int]) -> None:
    assert {*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT} == {*signals, signal.SIGHUP}


def test_what_a_killed_launch_left_is_removed_by_the_next_and_what_is_in_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)"
    link = tmp_path / f"{PREFIX}link"
    with started(submitted(program), tmp_path, {"TMPDIR": str(tmp_path)}) as process:
        wait_until((tmp_path / "begun").exists, 30)
        (used,) = tmp_path.glob(f"{PREFIX}*")
        link.symlink_to(used)
        with private_folder() as folder:
            assert {*tmp_path.glob(f"{PREFIX}*")} == {used, folder, link}
        process.kill()
        process.wait(10)
        wait_until(lambda: remove_stale(tmp_path) == [used], 10)
    assert not used.exists() and not folder.exists()


RESTARTED = """
import signal, sys
from pathlib import Path
from launch.submit import submit
signals = {signal.SIGTERM: signal.SIGCHLD}
sys.exit(submit([sys.executable, "-c", sys.argv[1]], {}, signals, max_restarts=2, run_directory=Path("run")))
"""


@pytest.mark.parametrize("code, held", [(75, 75), (2, 1)], ids=["stopped", "usage error"])
def test_the_last_attempts_end_is_in_the_run_directory(tmp_path: Path, code: int, held: int) -> None:
    """The first attempt leaves its end there; the second ends before it has come to the directory."""
    (tmp_path / "run").mkdir()
    first = f"open('run/outcome.json', 'w').write('''{as_json(1)}'''); {write(as_json(1), 1)}"
    asked = "import time; os.kill(os.getppid(), 15); time.sleep(0.5); " if code == 75 else ""
    program = (
        "import os\n"
        f"if os.environ.get('DDP_RESTART_COUNT') is None:\n    {first}\n"
        f"{asked}{write(as_json(code), 1)}"
    )  # fmt: skip
    ended = run_command(python("-c", RESTARTED, program), tmp_path, timeout=30)
    assert ended.code == code, ended
    left = read(tmp_path / "run" / "outcome.json")
    assert left is not None and left.code == held
    correct(tmp_path / "run", left, Outcome(75, 0, 1, "here", None, "stopped"))  # not an end of these attempts
    assert read(tmp_path / "run" / "outcome.json") == left
