"""Saving that is cut short, and checkpoints that are damaged: the newest that is whole is the one resumed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import evidence
from faults.running import Ranks, run
from faults.small_job import expect_same_end, undisturbed
from faults.verdict import Row, dealt, expect
from kill_while_saving import kill_cases

KEPT = {"checkpoint__keep": 10}
DAMAGES = ("truncated", "bit_flipped", "missing", "no_manifest", "empty_manifest")


@dataclass(frozen=True)
class CutShort:
    """Of a kill inside saving: an even seed kills at a random moment, an odd one at a random file operation."""

    seed: int


def cut_short_cases(generator: random.Random, count: int) -> Sequence[CutShort]:
    first = generator.randrange(1 << 30)
    return [CutShort(first + index) for index in range(count)]


def check_cut_short(case: CutShort, _folder: Path) -> tuple[float, str]:
    came_to = kill_cases(case.seed, 1)
    expect(not came_to.faults, "; ".join(came_to.faults))
    return 0.0, "left half a checkpoint beside the valid one" if came_to.while_saving else "between two saves"


@dataclass(frozen=True)
class Damage:
    """What is done to a file of each of the newest `checkpoints`; `place` chooses file, byte and bit."""

    kind: str
    checkpoints: int
    place: int


def cases(generator: random.Random, count: int) -> Sequence[Damage]:
    kinds = dealt(generator, DAMAGES, count)
    return [Damage(kind, generator.choice((1, 1, 2, 3)), generator.randrange(1 << 40)) for kind in kinds]


def check(case: Damage, folder: Path) -> tuple[float, str]:
    undisturbed(folder, 2, **KEPT)
    whole = next(folder.parent.glob("undisturbed-2-*checkpoint__keep*"))
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    for file in folder.glob("weights-*"):
        file.unlink()
    (folder / evidence.RUN / "outcome.json").unlink()
    damaged = evidence.checkpoints(folder)[: case.checkpoints]
    for checkpoint in damaged:
        _damage(checkpoint, case)
    ended = run(Ranks("warm", 2, resume=True), folder)
    expect(ended.code == 0, f"the run could not go on: {ended}")
    for checkpoint in damaged:
        lines = [line for line in ended.stderr.splitlines() if "passing over" in line and checkpoint.name in line]
        expect(lines, f"{checkpoint.name} is not named among those passed over: {ended}")
    expect_same_end(folder, 2, **KEPT)
    return 0.0, f"passed over {', '.join(path.name for path in damaged)}; same weights"


def _damage(checkpoint: Path, case: Damage) -> None:
    manifest = checkpoint / "manifest.json"
    files = sorted(path for path in checkpoint.iterdir() if path != manifest)
    file = files[case.place % len(files)]
    content = bytearray(file.read_bytes())
    match case.kind:
        case "truncated":
            file.write_bytes(content[: case.place % len(content)])
        case "bit_flipped":
            content[case.place // 8 % len(content)] ^= 1 << case.place % 8
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "no_manifest":
            manifest.unlink()
        case _:
            manifest.write_bytes(b"")


CUT_SHORT = Row(
    "kill-saving",
    "kill at random points inside saving (a writer without torch)",
    "a valid checkpoint is there each time, the newest; the next save leaves no rubbish",
    200,
    cut_short_cases,
    check_cut_short,
)
DAMAGE = Row(
    "damage",
    "truncated, bit-flipped, missing checkpoint files",
    "the newest valid checkpoint is resumed, those passed over are named; same weights",
    20,
    cases,
    check,
)
