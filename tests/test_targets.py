"""Target lists of live runs, dead runs (a real process, killed) and runs that cannot write theirs."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ddp.telemetry.targets import publish, remove_stale

CHILD = """
import sys
from pathlib import Path
from ddp.telemetry.targets import publish
publish(Path(sys.argv[1]), sys.argv[2], "127.0.0.1:9")
print("published", flush=True)
sys.stdin.read()
"""


def start_run(directory: Path, run_id: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(directory), run_id]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "published\n"
    return child


def end_run(child: subprocess.Popen[str], number: signal.Signals = signal.SIGKILL) -> None:
    with child:
        child.send_signal(number)
        child.wait(timeout=30)


def test_a_target_list_is_what_file_sd_reads_and_goes_on_close(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        target = publish(tmp_path / "runs" / "targets", "digits-1", "127.0.0.1:4321")
    finally:
        os.umask(umask)
    path = tmp_path / "runs" / "targets" / "digits-1.json"
    assert target.path == path
    assert json.loads(path.read_text()) == [{"targets": ["127.0.0.1:4321"], "labels": {"run": "digits-1"}}]
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (path.parent.parent, path.parent, path)]
    assert modes == [0o755, 0o755, 0o644]  # readable by Prometheus' own user, whatever the umask
    assert list(path.parent.iterdir()) == [path]
    target.close()
    assert list(path.parent.iterdir()) == []
    target.close()


def test_a_directory_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    directory = tmp_path / "targets"
    directory.mkdir(mode=0o700)
    publish(directory, "a", "127.0.0.1:1").close()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_next_run_removes_what_a_killed_one_left_and_spares_the_living(tmp_path: Path) -> None:
    killed, living = start_run(tmp_path, "killed"), start_run(tmp_path, "living")
    try:
        end_run(killed)
        assert {path.name for path in tmp_path.iterdir()} == {"killed.json", "living.json"}
        target = publish(tmp_path, "next", "127.0.0.1:2")
        assert {path.name for path in tmp_path.iterdir()} == {"living.json", "next.json"}
        target.close()
    finally:
        end_run(living)
    assert remove_stale(tmp_path) == [tmp_path / "living.json"]


def test_a_restart_takes_the_file_over_and_the_old_one_leaves_it(tmp_path: Path) -> None:
    old = publish(tmp_path, "a", "127.0.0.1:1")
    new = publish(tmp_path, "a", "127.0.0.1:2")
    old.close()
    assert json.loads((tmp_path / "a.json").read_text())[0]["targets"] == ["127.0.0.1:2"]
    new.close()
    assert not (tmp_path / "a.json").exists()


def test_a_folder_that_cannot_be_had_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        target = publish(tmp_path / "runs" / "targets", "a", "127.0.0.1:1")
    target.close()
    assert target.path is None
    assert "Prometheus will not find this run" in caplog.text


def test_an_endpoint_over_tls_says_so(tmp_path: Path) -> None:
    publish(tmp_path, "a", "node-7:9000", "https")
    assert json.loads((tmp_path / "a.json").read_text()) == [
        {"targets": ["node-7:9000"], "labels": {"run": "a", "__scheme__": "https"}}
    ]


def test_links_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere, targets = tmp_path / "elsewhere", tmp_path / "targets"
    elsewhere.mkdir()
    (elsewhere / "stale.json").write_text("kept")
    targets.symlink_to(elsewhere)
    assert publish(targets, "a", "127.0.0.1:1").path is None
    assert "the folder is a link" in caplog.text
    assert [path.name for path in elsewhere.iterdir()] == ["stale.json"]
    targets.unlink()
    targets.mkdir()
    for name in ("a.json", "other.json"):
        (targets / name).symlink_to(elsewhere / "stale.json")
    publish(targets, "a", "127.0.0.1:2")
    assert not (targets / "a.json").is_symlink()
    assert (elsewhere / "stale.json").read_text() == "kept"
