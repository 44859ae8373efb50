"""Page faults of real steps, in processes of their own: what the C library is told stays with a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, torch
from ddp.training.memory import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is a page, not 2 MiB
torch.set_num_threads(1)
said = keep_freed_memory()
model = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500) for _ in range(4)))  # gradients of 9 MB each

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        model(torch.ones(2, 1500)).sum().backward()
        model.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = min(faults() for _ in range(8))
keep_freed_memory(False)
held = [torch.empty(1 << 17) for _ in range(512)]  # fills the holes of the heap: how many would hold a gradient, is luck
print(int(said), kept, faults())
"""
PAGES_OF_FOUR_BACKWARDS = 4 * 4 * 9_000_000 // os.sysconf("SC_PAGESIZE")


def _run(variables: dict[str, str]) -> list[int]:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | variables, capture_output=True, timeout=120, check=True
    )
    return [int(word) for word in output.stdout.split()]


@pytest.mark.skipif("GLIBC_TUNABLES" in os.environ, reason="the environment tunes the C library")
def test_a_backward_finds_the_memory_of_the_one_before() -> None:
    said, kept, returned = _run({})
    assert said == 1
    assert kept < PAGES_OF_FOUR_BACKWARDS / 10 < PAGES_OF_FOUR_BACKWARDS * 0.9 < returned


def test_what_the_user_has_tuned_is_left_alone() -> None:
    said, kept, _ = _run({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert said == 0
    assert kept > PAGES_OF_FOUR_BACKWARDS * 0.9
