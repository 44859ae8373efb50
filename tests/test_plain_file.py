"""Files that a job names, and the job file itself: without an end, without a writer, too large; and pipes with a writer."""

from __future__ import annotations

import json
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from certificates import make_pair
from ddp.errors import JobFileError, UsageError
from ddp.job import MetricsSection, load_job, plain_file, read_plain_file
from ddp.telemetry.critical_batches import read_critical_batches
from ddp.telemetry.tls import tls_context
from jobs import python, run_command

JOB = '[run]\nsteps = 1\n[task]\nname = "digits"\n[batch]\nglobal_batch_size = 8\n'


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def test_neither_pipes_nor_devices_nor_what_is_too_large_is_read(tmp_path: Path, fifo: str) -> None:
    pair = make_pair(tmp_path, "server")
    tls = {"certificate": str(pair.certificate), "private_key": str(pair.key)}
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path, reason in (
        *((name, "it is not a plain file") for name in (fifo, "/dev/zero", "/dev/null")),
        (str(large), "it has more than 16,777,216 bytes"),
        (str(tmp_path), "Is a directory"),
    ):
        with pytest.raises(UsageError, match=f"noise_scale.critical_batch_result: {path}: cannot read it: {reason}"):
            read_critical_batches(path)
        for name in ("certificate", "client_certificates"):
            with pytest.raises(UsageError, match=f"metrics.{name}: cannot read {path}: {reason}"):
                tls_context(MetricsSection.model_validate({**tls, name: path}))


def test_a_job_file_is_no_pipe_without_a_writer(fifo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobFileError, match=f"{fifo}: cannot read the job file: it is a pipe that nobody writes to"):
        load_job(fifo)
    monkeypatch.setattr(plain_file, "PIPE_SECONDS", 0.1)
    with closing(os.fdopen(os.open(fifo, os.O_RDWR))), pytest.raises(JobFileError, match="not all of it came"):
        load_job(fifo)


def test_a_pipe_with_a_slow_writer_is_read_to_its_end(tmp_path: Path) -> None:
    """Larger than a pipe holds, and begun before the writer has anything to say."""
    reading, writing = os.pipe()
    content = json.dumps(list(range(100_000))).encode()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    writer = threading.Timer(0.2, write)
    writer.start()
    try:
        assert read_plain_file(f"/dev/fd/{reading}", len(content), pipes=True) == content
    finally:
        writer.join()
        os.close(reading)


@pytest.mark.parametrize(
    "command",
    ["{} < job.toml", "cat job.toml | {}", "(sleep 0.3; cat job.toml) | {}", "{} <(cat job.toml)"],
)
def test_a_job_comes_from_standard_input_or_a_command(tmp_path: Path, command: str) -> None:
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    path = "" if "<(" in command else " /dev/stdin"
    train = " ".join(python("-m", "ddp", "train", "--print-config")) + path
    ended = run_command(["bash", "-c", command.format(train)], tmp_path)
    assert ended.code == 0 and 'name = "digits"' in ended.stdout, ended
