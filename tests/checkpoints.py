"""Checkpoints for tests: saved by one rank and waited for, and damaged as disks and people damage them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp.checkpoint import Saver


def save(
    directory: Path,
    step: int,
    *,
    keep: int = 2,
    shared: Any = None,
    own: Mapping[str, Any] | None = None,
    metric: tuple[str, float] | None = None,
    keep_best: int = 0,
    goal: str = "max",
) -> Path:
    """One checkpoint of one rank."""
    saver = Saver(directory, rank=0, world_size=1, keep=keep, keep_best=keep_best, goal=goal)
    try:
        saver.begin(
            step,
            {"weight": torch.full((300,), float(step))} if shared is None else shared,
            {"own": step} if own is None else own,
            metric,
        )
        return saver.finish(lambda mine: [mine])
    finally:
        saver.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def rewrite_manifest(path: Path, name: str) -> None:
    """What someone with access to the directory would do who has changed a file."""
    digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[0]
    table = json.loads((path / "manifest.json").read_text())
    table["files"][name] = {"size_bytes": (path / name).stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(table))


def change_manifest(path: Path, **changes: Any) -> None:
    table = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(table | changes))


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        reason = f"a disk of {size} needs root and mount: {mounted.stderr.strip()}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
