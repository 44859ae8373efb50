"""Secrets: named in a job and never held by it, read when the task is built, hidden in all that is shown."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import JobFileError, UsageError
from ddp.job import CustomSection, RedactingFormatter, apply_overrides, parse_job, redact, resolve_secrets
from ddp.job.run_id import check_run_id
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording, read_events
from ddp.telemetry.records import RunEvent
from ddp.telemetry.sinks import Sinks
from jobs import environment, python, run_command
from telemetry_records import run_info

JOB: dict[str, Any] = {"run": {"steps": 1}, "batch": {"global_batch_size": 6}}
VALUE = 'correct horse "battery" \\ staple/é'
TASK = '''
"""Fails in a way that shows the options it was given."""

import logging


class Task:
    goals = {"accuracy": "max"}

    def __init__(self, password, names):
        self.password = password
        logging.getLogger("ddp").warning("signing in with %s", password)
        {action}

    def model(self): ...
    def datasets(self): ...
    def loss(self, model, batch): ...
    def metrics(self, model, batch): ...
'''
IN_A_THREAD = "import threading; t = threading.Thread(target=open, args=(password,)); t.start(); t.join()"


@pytest.mark.parametrize(
    "options",
    [
        {"token": "abcdef"},
        {"hub_token": "abcdef"},
        {"password": "abcdef"},
        {"db": {"password": "abcdef"}},
        {"servers": [{"passwd": "abcdef"}]},
        {"passwords": ["abcdef"]},
        {"API_KEY": "abcdef"},
        {"apiKey": "abcdef"},
        {"aws_secret_access_key": "abcdef"},
        {"client-secret": "abcdef"},
        {"credentials": "abcdef"},
        {"pin": "x", "pass": 1234},
        {"token": {"env": "A", "file": "b"}},
        {"password": {"value": "abcdef"}},
        {"url": "postgres://me:abcdef@host/data"},
    ],
)
def test_a_secret_in_the_job_itself_is_refused_and_not_repeated(options: dict[str, Any]) -> None:
    with pytest.raises(JobFileError, match=r"task.*options\..*env = .*file = ") as caught:
        parse_job({**JOB, "task": {"name": "a:B", "options": options}})
    assert "abcdef" not in str(caught.value) and "1234" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 128, "max_tokens": 5, "tokenizer": "bytes", "pad_token": "<pad>", "eos_tokens": ["a"]},
        {"passes": 3, "author": "me", "secretary": "b", "keys": ["a"], "key": "x", "monkey": "y", "compass": "n"},
        {"token": {"env": "TOKEN"}, "db": {"password": {"file": "/p"}}, "list": [{"env": "A"}]},
        {"password": "", "use_token": True, "url": "https://host/a:b@c"},
    ],
)
def test_what_is_no_secret_stays(options: dict[str, Any]) -> None:
    job = parse_job({**JOB, "task": {"name": "a:B", "options": options}})
    assert isinstance(job.task, CustomSection) and job.task.options == options


def test_on_the_command_line_too() -> None:
    table = {**JOB, "task": {"name": "a:B"}}
    with pytest.raises(JobFileError, match="a secret does not belong") as caught:
        parse_job(apply_overrides(table, ["task.options.password=hunter22"]))
    assert "hunter22" not in str(caught.value)
    job = parse_job(apply_overrides(table, ['task.options.password={env = "PASSWORD"}']))
    assert 'env = "PASSWORD"' in job.to_toml()


def test_references_are_read_from_the_environment_and_from_private_files(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{VALUE}\n", encoding="utf-8")
    file.chmod(0o600)
    options = {"a": {"env": "NAME"}, "b": [{"file": str(file)}, 3], "c": {"d": {"env": "NAME"}, "e": "text"}}
    assert resolve_secrets(options, {"NAME": "from the environment"}, "task.options") == {
        "a": "from the environment",
        "b": [VALUE, 3],
        "c": {"d": "from the environment", "e": "text"},
    }


def test_what_is_wrong_with_a_reference(tmp_path: Path) -> None:
    for name, content, mode in (
        ("open", b"abcdef", 0o644),
        ("bytes", b"\xff\xfe\xff\xfe", 0o600),
        ("short", b"abc\n", 0o600),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(mode)
    for reference, message in (
        ({"env": "NOT_SET"}, "task.options.a: the environment variable NOT_SET is not set"),
        ({"env": "SHORT"}, "fewer than 4 characters"),
        ({"file": str(tmp_path / "short")}, "fewer than 4 characters"),
        ({"file": str(tmp_path / "no")}, "task.options.a: cannot read .*/no: No such file"),
        ({"file": "a\0b"}, "task.options.a: cannot read"),
        ({"file": str(tmp_path)}, "cannot read .*: Is a directory"),
        ({"file": "/dev/zero"}, "is not a plain file"),
        ({"file": str(tmp_path / "bytes")}, "is not UTF-8 text"),
        (
            {"file": str(tmp_path / "open")},
            f"others may read .*: run `chmod 600 {re.escape(str(tmp_path))}/open` first",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_secrets({"a": reference}, {"SHORT": "abc"}, "task.options")


def test_every_way_of_writing_it_is_hidden() -> None:
    resolve_secrets({"a": {"env": "NAME"}}, {"NAME": VALUE}, "task.options")
    for text in (f"x {VALUE} y", f"{[VALUE]!r}", f"{{{VALUE!r}: 1}}"):
        assert "***" in redact(text) and "horse" not in redact(text)
    record = logging.LogRecord("ddp", logging.INFO, "", 0, "with %s", (VALUE,), None)
    assert RedactingFormatter().format(record) == "with ***"


@pytest.mark.parametrize(
    "action",
    ['raise ValueError(f"cannot sign in with {password!r}")', "raise SystemExit(1)", "pass", IN_A_THREAD],
)
def test_a_run_shows_no_secret_anywhere(tmp_path: Path, action: str) -> None:
    (tmp_path / "own_task.py").write_text(TASK.replace("{action}", action), encoding="utf-8")
    (tmp_path / "job.toml").write_text(
        '[run]\nsteps = 1\nid = "run"\n[task]\nname = "own_task:Task"\n'
        'options = { password = { env = "MINE" }, names = ["a"] }\n[batch]\nglobal_batch_size = 6\n'
    )
    command = python("-m", "ddp", "train", "job.toml", "--allow-import", "own_task")
    outcome = tmp_path / "ended.json"
    ended = run_command(command, tmp_path, {"MINE": VALUE, "DDP_OUTCOME_FILE": str(outcome)})
    assert ended.code == 0 or "***" in ended.stderr, ended
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    shown = [ended.stdout, ended.stderr, *(path.read_text(encoding="utf-8", errors="replace") for path in written)]
    assert not any("horse" in text for text in shown), shown
    assert "signing in with ***" in ended.stderr


NOT_CAUGHT = """
import gc, sys, threading, warnings
from ddp.job import hide_secrets_in_hooks, resolve_secrets

class Finalized:
    def __init__(self, word): self.word = word
    def __repr__(self): return f"<with {self.word}>"
    def __del__(self): raise ValueError(f"finalizer: {self.word}")

def fail(word): raise ValueError(f"thread: {word}")

hide_secrets_in_hooks()
word = resolve_secrets({"a": {"env": "MINE"}}, {"MINE": "correct horse"}, "o")["a"]
thread = threading.Thread(target=fail, args=(word,), name=f"signed in with {word}")
thread.start(); thread.join()
quiet = threading.Thread(target=sys.exit, args=(word,)); quiet.start(); quiet.join()
Finalized(word); gc.collect()
warnings.warn(f"warning: {word}")
raise ValueError(f"main: {word}")
"""


def test_what_nobody_catches_shows_no_secret(tmp_path: Path) -> None:
    ended = run_command(python("-c", NOT_CAUGHT), tmp_path)
    assert ended.code == 1 and "horse" not in ended.stderr, ended.stderr
    for shown in (
        "Exception in thread signed in with ***:\nTraceback",
        *(
            "ValueError: thread: ***",
            "ValueError: finalizer: ***",
            "UserWarning: warning: ***",
            "ValueError: main: ***",
        ),
    ):
        assert ended.stderr.count(shown) == 1, ended.stderr


def test_what_happened_to_a_run_is_recorded_without_secrets(tmp_path: Path) -> None:
    resolve_secrets({"a": {"env": "NAME"}}, {"NAME": VALUE}, "task.options")
    recorder = Recorder(tmp_path / "run.db", run_info())
    sinks = Sinks([recorder])
    sinks.event(RunEvent(1, 0.0, "save_failed", -1, f"cannot write: {VALUE}"))
    sinks.close()
    with closing(open_recording(tmp_path / "run.db")) as database:
        assert [event.text for event in read_events(database)] == ["cannot write: ***"]


def test_the_job_as_printed_holds_the_reference(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        '[run]\nsteps = 1\n[task]\nname = "own_task:Task"\noptions = { password = { env = "MINE" } }\n'
        "[batch]\nglobal_batch_size = 6\n"
    )
    command = python("-m", "ddp", "train", "job.toml", "--allow-import", "own_task", "--print-config")
    ended = run_command(command, tmp_path, {**environment(), "MINE": VALUE})
    assert (ended.code, 'env = "MINE"' in ended.stdout, "horse" in ended.stdout) == (0, True, False), ended


@pytest.mark.parametrize(
    "value", ["٣run", "run\n", "ｒun", "a..b/..", "..", ".", "a\0", "x" * 65, "é", "-a", "a b", "", "targets"]
)
def test_ids_of_runs_that_are_no_plain_names(value: str) -> None:
    with pytest.raises(ValueError, match="is not a run id"):
        check_run_id(value)
