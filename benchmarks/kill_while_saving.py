"""Kill a process at random points while it saves checkpoints; a whole one must be there each time, and the right one.

    python benchmarks/kill_while_saving.py --kills 200 --seed 1

The writer loads no torch, so that hundreds of them can be forked from one warm process a minute. Half of them are killed
at a random moment, half at a random file operation, since most moments are spent waiting for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from ddp.checkpoint import (
    SHARED,
    RawTensor,
    Saver,
    clear_left_overs,
    load_part,
    newest,
    rank_file,
    read_manifest,
    verify,
)
from ddp.checkpoint.staging import make
from ddp.errors import CheckpointError

RANKS = 2
ELEMENTS = 301
KEEP = 2
DEADLINE_SECONDS = 60.0
_FILE_OPERATIONS = ("open", "os.", "shutil.")
_OPERATIONS_OF_A_SAVE = 60  # about as many as the audit sees


@dataclass(frozen=True, slots=True)
class KillCases:
    """What came of it. `faults` has a line for each case in which something was lost, torn or left behind."""

    kills: int
    while_saving: int  # those that left a directory behind that was being written or removed
    seconds: float
    faults: tuple[str, ...]

    def row(self) -> str:
        """For a table of faults."""
        lost = (
            f"{len(self.faults)} faults: {self.faults[0]}"
            if self.faults
            else "a valid checkpoint each time, the newest"
        )
        return (
            f"| kill at {self.kills} random points inside saving ({self.while_saving} left half a checkpoint) | {lost} | "
            f"{60 * self.kills / self.seconds:.0f} a minute |"
        )


def kill_cases(seed: int, count: int) -> KillCases:
    """`count` kills in a process of its own, which has no torch to be forked with."""
    command = [sys.executable, str(Path(__file__).resolve()), "--kills", str(count), "--seed", str(seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 3 * count, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"the writers' process ended with {done.returncode}: {done.stderr}")
    table = json.loads(done.stdout)
    return KillCases(**table | {"faults": tuple(table["faults"])})


def run_cases(seed: int, count: int, place: Path) -> KillCases:
    """The same in this process, which must have no other threads."""
    draw, began = random.Random(seed), time.monotonic()
    faults: list[str] = []
    while_saving = 0
    save_seconds = _time_a_save(place / "timed")
    for attempt in range(count):
        directory = place / str(attempt)
        operation = draw.randrange(2 * _OPERATIONS_OF_A_SAVE) if (seed + attempt) % 2 else None
        delay = draw.uniform(0, 2 * save_seconds)
        finished = _killed_writer(directory, operation, delay)
        while_saving += any(directory.glob(".step-*"))
        point = f"after {1e3 * delay:.1f} ms" if operation is None else f"at file operation {operation}"
        faults += [
            f"kill {attempt}, {point}, step {finished} was saved: {fault}" for fault in _faults(directory, finished)
        ]
    return KillCases(count, while_saving, time.monotonic() - began, tuple(faults))


def _killed_writer(directory: Path, operation: int | None, delay: float) -> int:
    """Fork a writer and kill it; returns the last step that it knew to be saved."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _write_for_ever(directory, writer, operation)
    os.close(writer)
    try:
        os.read(reader, 1)  # the first is saved
        if operation is None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _wait_for_end(child)
        told = 1
        while more := os.read(reader, 1 << 16):
            told += len(more)
    finally:
        os.close(reader)
    return told


def _wait_for_end(child: int) -> None:
    until = time.monotonic() + DEADLINE_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise RuntimeError("a writer neither saved nor died")
        time.sleep(0.0005)


def _write_for_ever(directory: Path, told: int, operation: int | None) -> NoReturn:
    try:
        savers = _savers(directory)
        for step in range(1, 10_000):
            save(savers, step)
            os.write(told, b".")
            if step == 1 and operation is not None:
                _die_at(operation)
    finally:
        os._exit(1)


def _die_at(operation: int) -> None:
    left = operation

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal left
        if event.startswith(_FILE_OPERATIONS):
            left -= 1
            if left == -1:  # once: a kill is such an event itself
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def _savers(directory: Path) -> list[Saver]:
    return [Saver(directory, rank=rank, world_size=RANKS, keep=KEEP, keep_best=1, goal="min") for rank in range(RANKS)]


def save(savers: list[Saver], step: int) -> None:
    """One checkpoint by all ranks, which live in this process; every other one is waited for by looking at rows."""
    for rank, saver in enumerate(savers):
        shared = {"weight": _numbers(step)} if rank == 0 else {}
        saver.begin(step, shared, {"rank": rank, "own": _numbers(step + rank)}, metric=("loss", 1 / step))
    everyones = [saver.part_saved for saver in savers]
    while step % 2 and savers[0].pending is not None:
        time.sleep(0.0005)
        everyones = [saver.part_saved for saver in savers]
        for saver in savers:
            saver.observe(everyones)
    for saver in reversed(savers):  # rank 0 last: its `finish` waits for the publication
        saver.finish(lambda mine: [_wait_for(each, mine) for each in savers])


def _wait_for(saver: Saver, number: int) -> int:
    """What a gather does: the other ranks' numbers of the same save."""
    until = time.monotonic() + DEADLINE_SECONDS
    while abs(saver.part_saved) != abs(number) and time.monotonic() < until:
        time.sleep(0.0005)
    return saver.part_saved


def _numbers(first: int) -> RawTensor:
    return RawTensor("I64", (ELEMENTS,), struct.pack(f"<{ELEMENTS}q", *range(first, first + ELEMENTS)))


def _time_a_save(directory: Path) -> float:
    savers = _savers(directory)
    began = time.monotonic()
    for step in (1, 2):
        save(savers, step)
    for saver in savers:
        saver.close()
    return (time.monotonic() - began) / 2


def _faults(directory: Path, finished: int) -> Iterator[str]:
    path = newest(directory)
    if path is None:
        yield f"nothing valid in {sorted(each.name for each in directory.iterdir())}"
        return
    step = read_manifest(path).step
    if step not in (finished, finished + 1):
        yield f"the newest is {path.name}"
    manifest = read_manifest(path)
    for name, key, first in (
        (SHARED, "weight", step),
        *((rank_file(rank), "own", step + rank) for rank in range(RANKS)),
    ):
        if bytes(load_part(path, name, manifest, make)[key].data) != bytes(_numbers(first).data):
            yield f"{path.name}/{name} holds something else"
    for each in directory.glob("step-*"):
        try:
            verify(each)
        except CheckpointError as fault:
            yield f"a bad one has a name: {fault}"
    yield from _faults_of_going_on(directory, finished + 2)


def _faults_of_going_on(directory: Path, step: int) -> Iterator[str]:
    clear_left_overs(directory)
    savers = _savers(directory)
    save(savers, step)
    for saver in savers:
        saver.close()
    names = sorted(each.name for each in directory.iterdir())
    if any(name.startswith(".") or name.endswith(".replaced") for name in names) or len(names) > KEEP:
        yield f"the next save left {names}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        cases = run_cases(arguments.seed, arguments.kills, Path(place))
    print(json.dumps(asdict(cases)) if arguments.json else cases.row())
    return 1 if cases.faults else 0


if __name__ == "__main__":
    sys.exit(main())
