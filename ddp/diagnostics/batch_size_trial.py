"""The child process in which batch sizes are tried: it may run out of memory, and die of that, without harm.

    python -m ddp.diagnostics.batch_size_trial JOB.toml [--local-ranks N] [--memory-bytes N] [--allow-import MODULE]

Says what it found of the task, then answers each number of examples on its standard input with one line of JSON on
its standard output. What the task itself prints goes to standard error. Before anything of the task is loaded its
anonymous memory is limited to a part of what is free, over the ranks of a node; and the kernel is told to take this
process first if the machine runs short all the same. On CUDA the limit is that of torch's allocator on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ddp.diagnostics.free_memory import available_bytes
from ddp.errors import UsageError
from ddp.job import Job, load_job, redact

if TYPE_CHECKING:
    import torch

ENOUGH_SECONDS, MOST_REPEATS = 0.2, 10
USED_OF_FREE = 0.8  # the rest is for neighbours, and for what a limit on private memory does not see
MOST_LABELS = 10_000  # looked at to count classes
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a")
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    given = _arguments(arguments)
    answers = _private_stdout()
    _go_first_where_memory_runs_short()
    try:
        job = load_job(given.job_file)
        trial = Trial(job, given.local_ranks, given.memory_bytes, allow_import=given.allow_import)
    except Exception as error:
        _answer(answers, {"out_of_memory": is_out_of_memory(error), "error": _one_line(error)})
        return 1
    _answer(answers, trial.task_facts())
    for line in sys.stdin:
        _answer(answers, _tried(trial, int(line)))
    return 0


class Trial:
    """The job's task, as one rank would train it: its model, its optimizer, its data."""

    def __init__(self, job: Job, local_ranks: int, memory_bytes: int | None, *, allow_import: Sequence[str]) -> None:
        import torch

        from ddp.tasks import load_task
        from ddp.topology import SINGLE_PROCESS
        from ddp.training.data import fetcher
        from ddp.training.initialisation import initialise_
        from ddp.training.memory import keep_freed_memory
        from ddp.training.optimizers import build_optimizer
        from ddp.training.resources import choose_device
        from ddp.training.stream import is_stream

        torch.set_num_threads(job.run.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // local_ranks))
        torch.manual_seed(job.run.seed)
        self._device = choose_device(job.run.device, SINGLE_PROCESS)
        if self._device.type == "cuda":
            self.memory_bytes = limit_device(self._device, memory_bytes)
        else:
            self.memory_bytes = limit_process(local_ranks, memory_bytes)
            keep_freed_memory()
        self._task = load_task(job.task, allow_import=allow_import)
        self._model = self._task.model().to(self._device).train()
        initialise_(self._model, job.initialisation, job.run.seed)
        self._training, _ = self._task.datasets()
        if is_stream(self._training):
            raise UsageError(
                "the largest batch is tried out with a training set that has a length, and this one is a stream"
            )
        self._fetch = fetcher(self._training)
        self._optimizer = build_optimizer(job.optimizer, self._model.named_parameters())
        self.training_examples = len(self._training)  # type: ignore[arg-type]

    def task_facts(self) -> dict[str, Any]:
        """The limit; training examples, their classes and the share of the rarest, None where they are not known."""
        classes = getattr(self._task, "classes", None)
        rarest: float | None = None
        if classes is None:
            count = min(self.training_examples, MOST_LABELS)
            stride = self.training_examples / count
            looked_at = self._fetch([int(i * stride) for i in range(count)])
            classes, rarest = classes_in(looked_at, is_all=count == self.training_examples)
        return {
            "device": self._device.type,
            "memory_bytes": self.memory_bytes,
            "training_examples": self.training_examples,
            "classes": classes,
            "rarest_share": rarest,
        }

    def seconds(self, examples: int) -> float:
        """Of forward and backward over the first so many examples: the least of a few where they are short.

        A whole step comes before, so that all of the optimizer's state is there.
        """
        from ddp.training.data import to_device

        batch = to_device(self._fetch(list(range(examples))), self._device)
        self._step(batch)
        taken = [self._step(batch)]
        while sum(taken) < ENOUGH_SECONDS and len(taken) < MOST_REPEATS:
            taken.append(self._step(batch))
        return min(taken)

    def _step(self, batch: Any) -> float:
        """One step of training; returns the seconds of its forward and backward."""
        began = time.perf_counter()
        self._task.loss(self._model, batch).mean().backward()
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        elapsed = time.perf_counter() - began
        self._optimizer.step()
        self._optimizer.zero_grad()
        return elapsed

    def peak_bytes(self) -> int:
        """Of this process so far, or of its share of the device."""
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_process(local_ranks: int, memory_bytes: int | None) -> int:
    """Refuse this process more private memory than `memory_bytes`, or a rank's part of what is free; returns it."""
    limit = memory_bytes or int(USED_OF_FREE * available_bytes() / local_ranks)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return limit


def limit_device(device: torch.device, memory_bytes: int | None) -> int:
    """The same for torch's allocator on a CUDA device, which is a rank's alone."""
    import torch

    free_bytes, all_bytes = torch.cuda.mem_get_info(device)
    limit = min(memory_bytes or all_bytes, int(USED_OF_FREE * free_bytes))
    torch.cuda.set_per_process_memory_fraction(limit / all_bytes, device)
    return limit


def classes_in(batch: Any, *, is_all: bool) -> tuple[int | None, float | None]:
    """Classes and the rarest's share, where a batch is (inputs, integer labels (examples,)); else None.

    Where it `is_all` of the examples, counts are what they are. In a sample the smallest of many counts is small by
    chance: unless they differ by more than chance (chi-squared), the classes are taken to be equally frequent.
    """
    import torch

    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], torch.Tensor)):
        return None, None
    labels = batch[1]
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        return None, None
    counts = torch.unique(labels, return_counts=True)[1]
    if len(counts) > len(labels) // 2:  # numbers of some other kind
        return None, None
    expected = len(labels) / len(counts)
    chi2 = float(((counts - expected).square() / expected).sum())
    freedom = len(counts) - 1
    if not is_all and chi2 <= freedom + 3 * math.sqrt(2 * freedom):
        return len(counts), 1 / len(counts)
    return len(counts), counts.min().item() / len(labels)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or the device; torch and its libraries say it in words only."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == 12):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _tried(trial: Trial, examples: int) -> dict[str, Any]:
    try:
        seconds = trial.seconds(examples)
    except Exception as error:
        return {"examples": examples, "out_of_memory": is_out_of_memory(error), "error": _one_line(error)}
    return {"examples": examples, "seconds": seconds, "peak_bytes": trial.peak_bytes()}


def _one_line(error: BaseException) -> str:
    text = redact(" ".join(str(error).split()))[:300]
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _private_stdout() -> TextIO:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _go_first_where_memory_runs_short() -> None:
    """And go with the parent, which may be killed while a trial takes long."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="batch_size_trial", description=__doc__)
    parser.add_argument("job_file", type=Path)
    parser.add_argument("--local-ranks", type=int, default=1)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--allow-import", action="append", default=[])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
