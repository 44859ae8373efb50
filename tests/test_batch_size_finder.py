"""The search against a memory of known size; and real children that run out of memory, die, sleep and fail."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddp.diagnostics.batch_size_finder import (
    BatchTrials,
    LargestBatch,
    OutOfTimeError,
    TaskFacts,
    Trial,
    TrialError,
    find_largest_batch,
    largest_batch,
)
from ddp.diagnostics.batch_size_trial import classes_in, is_out_of_memory
from ddp.diagnostics.free_memory import available_bytes
from ddp.tasks.base import Goal, TensorExamples

MEBIBYTE = 1 << 20
EXAMPLES = 64


class Hungry:
    """A tiny regression that holds `mebibytes` an example until the backward; from `most` to twice as many `action` happens."""

    goals: Mapping[str, Goal] = {}
    classes = 7

    def __init__(self, mebibytes: int = 0, most: int = EXAMPLES, action: str = "") -> None:
        self.mebibytes, self.most, self.action = mebibytes, most, action

    def model(self) -> nn.Module:
        print("a task may print")
        return nn.Linear(3, 1)

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        inputs = torch.randn(EXAMPLES, 3)
        return TensorExamples(inputs), TensorExamples(inputs)

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        (inputs,) = batch
        ballast = torch.ones(len(inputs), self.mebibytes * MEBIBYTE // 4)
        if self.most < len(inputs) <= 2 * self.most:
            match self.action:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sleep":
                    time.sleep(60)
                case "fail":
                    raise ValueError("no such\nbatch")
        return model(inputs)[:, 0].square() + 0 * ballast.sum(dim=1)

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Tensor]:
        return {}


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find this module."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def job_file(folder: Path, **options: object) -> Path:
    listed = ", ".join(f"{name} = {value!r}".replace("'", '"') for name, value in options.items())
    path = folder / "job.toml"
    path.write_text(
        f"[run]\nsteps = 1\ndevice = 'cpu'\n[task]\nname = 'test_batch_size_finder:Hungry'\noptions = {{ {listed} }}\n"
        "[batch]\nglobal_batch_size = 8\n[evaluation]\nmetric = 'loss'\n",
        encoding="utf-8",
    )
    return path


# The search

FACTS = TaskFacts("cpu", 1 << 30, 1472, None, None)


def search(holds: int, start: int, facts: TaskFacts = FACTS) -> LargestBatch:
    return find_largest_batch(lambda size: Trial(size, size <= holds), facts, start)


@pytest.mark.parametrize("holds", [1, 2, 3, 15, 16, 17, 100, 777, 1023, 1024, 1471])
@pytest.mark.parametrize("start", [1, 2, 16, 300, 1472])
def test_the_ends_close_in_on_what_memory_holds(holds: int, start: int) -> None:
    found = search(holds, start)
    assert found.ended_by == "memory" and found.too_large is not None
    assert found.examples <= holds < found.too_large
    assert found.too_large - found.examples <= max(1, found.examples / 16)
    assert len(found.trials) <= 2 * math.log2(1472)
    assert len({trial.examples for trial in found.trials}) == len(found.trials)


def test_no_batch_is_larger_than_the_training_set() -> None:
    found = search(10**9, 16)
    assert (found.examples, found.too_large, found.ended_by) == (1472, None, "training_set")
    assert [trial.examples for trial in found.trials][-2:] == [1024, 1472]
    assert "at least 1,472, the training set" in found.sentence()


def test_not_even_one_example() -> None:
    found = search(0, 16)
    assert (found.examples, found.too_large) == (0, 1)
    assert found.sentence() == "Not even one example fits a rank's 1 GiB on cpu."


def test_what_is_known_when_the_time_is_over_is_said() -> None:
    def slow(size: int) -> Trial:
        if size > 100:
            raise OutOfTimeError("too slow")
        return Trial(size, True)

    found = find_largest_batch(slow, FACTS, 16)
    assert (found.examples, found.too_large, found.ended_by) == (64, None, "time")
    assert "at least 64 (the time was over)" in found.sentence()


def test_both_ends_are_told() -> None:
    assert search(100, 16).sentence() == ("The largest batch per rank that fits 1 GiB on cpu: 100 (104 does not).")


# Real children


def test_memory_that_is_refused_and_a_child_that_is_killed_are_too_large(tmp_path: Path, importable: None) -> None:
    """40 MiB an example, of 1,536: 8 fit beside torch, and 40 do not fit by themselves. Then a child that dies."""
    limit = 1536 * MEBIBYTE
    path = job_file(tmp_path, mebibytes=40, most=9, action="die")
    with closing(
        BatchTrials(path, memory_bytes=limit, allow_import=["test_batch_size_finder"], seconds=120)
    ) as batch_trials:
        assert batch_trials.facts() == TaskFacts("cpu", limit, EXAMPLES, 7, None)
        held = batch_trials.try_batch(8)
        assert held.fits and held.seconds > 0
        assert 8 * 40 * MEBIBYTE < held.peak_bytes < limit + 300 * MEBIBYTE  # files mapped are not limited
        refused = batch_trials.try_batch(40)
        assert not refused.fits and batch_trials._child is None
        assert not batch_trials.try_batch(10).fits
        assert batch_trials.try_batch(9).fits


def test_a_trial_that_takes_too_long_is_given_up_and_ended(tmp_path: Path, importable: None) -> None:
    batch_trials = BatchTrials(
        job_file(tmp_path, most=8, action="sleep"), allow_import=["test_batch_size_finder"], seconds=120
    )
    with closing(batch_trials):
        assert batch_trials.try_batch(8).fits
        child = batch_trials._child
        batch_trials._deadline = time.monotonic() + 0.5
        with pytest.raises(OutOfTimeError):
            batch_trials.try_batch(16)
        assert child is not None and child.returncode == -signal.SIGKILL


def test_what_a_task_itself_does_wrong_is_no_lack_of_memory(tmp_path: Path, importable: None) -> None:
    path = job_file(tmp_path, most=8, action="fail")
    with pytest.raises(TrialError, match="a batch of 16 cannot be tried: ValueError: no such batch"):
        largest_batch(BatchTrials(path, allow_import=["test_batch_size_finder"]), start=16)


def test_code_from_outside_needs_leave(tmp_path: Path, importable: None) -> None:
    with pytest.raises(TrialError, match="give --allow-import test_batch_size_finder to allow it"):
        largest_batch(BatchTrials(job_file(tmp_path)), start=8)


def test_a_child_is_the_first_to_go_where_the_machine_runs_short(tmp_path: Path, importable: None) -> None:
    with closing(BatchTrials(job_file(tmp_path), allow_import=["test_batch_size_finder"])) as batch_trials:
        facts = batch_trials.facts()
        assert batch_trials._child is not None
        process = Path(f"/proc/{batch_trials._child.pid}")
        assert (process / "oom_score_adj").read_text() == "1000\n"
        (limit,) = [line for line in (process / "limits").read_text().splitlines() if line.startswith("Max data size")]
        assert limit.split()[3] == str(facts.memory_bytes)
        assert facts.memory_bytes < available_bytes()
    assert not process.exists()


# Classes


def test_classes_that_a_task_names_ask_for_a_batch() -> None:
    assert TaskFacts("cpu", 1, 100, 10, None).batch_for_classes() == (20, 30)
    assert TaskFacts("cpu", 1, 100, None, None).batch_for_classes() is None


def test_the_rarest_class_counts_where_it_is_seen() -> None:
    labels = torch.tensor([0] * 70 + [1] * 25 + [4] * 5)
    classes, rarest = classes_in((torch.zeros(100, 2), labels), is_all=True)
    assert (classes, rarest) == (3, 0.05)
    assert TaskFacts("cpu", 1, 100, classes, rarest).batch_for_classes() == (40, 60)


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_in_a_sample_the_smallest_of_many_counts_is_not_the_rarest_class(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (10_000,), generator=generator)
    found, share = classes_in((torch.zeros(10_000, 1), labels), is_all=False)
    assert found == classes and share == pytest.approx(1 / classes)
    rare = torch.where(labels == 0, torch.where(torch.rand(10_000, generator=generator) < 0.5, 1, 0), labels)
    rare = torch.cat([rare, torch.full((500 * 10_000 // classes // 100,), 2)])  # 2 is frequent, 0 is rare
    _, share = classes_in((torch.zeros(len(rare), 1), rare), is_all=False)
    assert share is not None and (share < 0.7 / classes or classes == 1000)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(9, 2),
        (torch.zeros(9, 2),),
        (torch.zeros(9, 2), torch.zeros(9)),
        (torch.zeros(9, 2), torch.zeros(9, 2, dtype=torch.long)),
        (torch.zeros(9, 2), torch.arange(9)),
        {"inputs": torch.zeros(9, 2)},
    ],
    ids=["tensor", "one", "targets", "sequences", "numbers", "mapping"],
)
def test_what_is_no_class_is_not_taken_for_one(batch: object) -> None:
    assert classes_in(batch, is_all=True) == (None, None)


# What memory is free, and what running out of it looks like


def test_real_refusals_are_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError())


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"


def test_the_narrowest_limit_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "5\n",
            "sys/fs/cgroup/a/memory.max": "300000\n",
            "sys/fs/cgroup/a/memory.current": "100000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 10\ninactive_file 7000\n",
        },
    )
    assert available_bytes(root) == 207_000


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "6000\n",
        },
    )
    assert available_bytes(root) == 0


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, {"proc/meminfo": MEMINFO})) == 600 * 1024
    with pytest.raises(OSError, match="does not say"):
        available_bytes(tmp_path / "elsewhere")
