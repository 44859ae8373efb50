"""Readers of files, names and environments: whatever comes, an answer or an error of ours, and nothing outside is touched.

A few hundred inputs each, the same ones every time; `benchmarks/fuzz.py` goes on for as long as it is told to.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from ddp.errors import JobFileError
from ddp.job import load_job
from hostile_inputs import READERS, Reader

NOT_CHECKED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_no_input_gets_further_than_an_error(reader: Reader) -> None:
    if reader.name == "manifest" and importlib.util.find_spec("ddp.checkpoint") is None:
        pytest.skip("needs the package of checkpoints")

    @settings(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=NOT_CHECKED)
    @given(reader.inputs)
    def attempt(value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            reader.check(Path(folder), value)

    attempt()


@pytest.mark.parametrize(
    "content",
    [
        b"#" * (1 << 20) + b"\n",
        b"a = " + b"[" * 5000 + b"]" * 5000,
        b"a = " + b"[" * 100_000,
        b"a." * 5000 + b"b = 1",
        b"[" + b"a." * 5000 + b"b]",
        b"a = " + b"9" * 5000,
        b"a = 1\r",
        b"\xef\xbb\xbfa = 1",
        b"".join(b"[x%d]\n" % number for number in range(20_000)),
        b"[" + b"x" * 500_000 + b"]",
    ],
    ids=["large", "deep", "open", "dotted", "table", "long number", "return", "mark", "many", "long name"],
)
def test_files_that_are_too_much_are_refused_in_few_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 10_000


@pytest.mark.parametrize("path", ["", "/", "/dev/zero", "nowhere", "a\0b", "x" * 300])
def test_paths_that_are_no_job_files(path: str) -> None:
    with pytest.raises(JobFileError):
        load_job(path)
