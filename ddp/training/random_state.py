"""The random generators of a process as plain values, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch


def seed_rank(seed: int, rank: int) -> None:
    """Seed all generators of this process: each rank draws its own numbers, and the same ones in the next run."""
    for_torch, for_numpy, for_python = np.random.SeedSequence((seed, rank)).generate_state(3).tolist()
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)
    random.seed(for_python)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside, afterwards the generators go on as if nothing had been."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def random_state() -> dict[str, Any]:
    """The state of this process's generators (torch, its CUDA device's, numpy's, Python's), fit for a checkpoint."""
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": _numpy_state(),
        "python": (version, torch.tensor(words), next_gauss),
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Continue the generators where `random_state` found them; CUDA's only where there is a device."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))


def _numpy_state() -> tuple[str, torch.Tensor, int, int, float]:
    """numpy's global generator; its words as int64, because torch knows uint32 only in part."""
    state = cast(Mapping[str, Any], np.random.get_state(legacy=False))
    words = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return (
        str(state["bit_generator"]),
        words,
        int(state["state"]["pos"]),
        int(state["has_gauss"]),
        float(state["gauss"]),
    )
