"""Dictionaries of tensors: a model that is called as `model(**batch)`, on a data set of columns, as HuggingFace has them.

From the repository's root:

    torchrun --nproc-per-node 2 -m ddp train --allow-import examples examples/dictionary_task.toml

The task is which letter occurs most often in a short text. `datasets.Dataset` can stand where `Columns` does: with its format
as it comes, of Python lists, or `with_format("torch")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ddp.tasks.base import Goal

LETTERS, LONGEST, PADDING = 6, 24, 0


class Columns(Dataset[dict[str, Any]]):
    """Answers a list of indices with a dictionary of columns, one index with one of values; lists, not tensors."""

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self.columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, index: int | Sequence[int] | str) -> Any:
        if isinstance(index, str):
            return self.columns[index]
        if isinstance(index, int):
            return {name: column[index] for name, column in self.columns.items()}
        return {name: [column[each] for each in index] for name, column in self.columns.items()}


@dataclass
class Output:
    """What the model returns: `loss` where it is given labels, the mean over the batch."""

    logits: Tensor  # (n, LETTERS)
    loss: Tensor | None = None


class Counter(nn.Module):
    """Adds up what it learns of each letter, and decides: (n, length) int64 to (n, LETTERS)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS + 1, width)
        self.decide = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, LETTERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        known = attention_mask.unsqueeze(-1)
        mean = (self.letters(input_ids) * known).sum(dim=1) / known.sum(dim=1)
        logits = self.decide(mean)
        return Output(logits, None if labels is None else cross_entropy(logits, labels))


class MostFrequentLetter:
    """Batches are {"input_ids": (n, LONGEST), "attention_mask": (n, LONGEST), "labels": (n,)}, all int64."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}

    def __init__(self, examples: int = 4000, width: int = 48) -> None:
        self.examples, self.width = examples, width

    def model(self) -> nn.Module:
        return Counter(self.width)

    def datasets(self) -> tuple[Columns, Columns]:
        return _texts(self.examples, seed=0), _texts(self.examples // 4, seed=1)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """One value an example, which the model's own mean is not: it is made of the logits."""
        return cross_entropy(model(**batch).logits, batch["labels"], reduction="none")

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": model(**batch).logits.argmax(dim=1) == batch["labels"]}


def _texts(examples: int, seed: int) -> Columns:
    """Every rank makes the same ones: the generator is seeded here, not by the run."""
    generator = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for _ in range(examples):
        label, length = int(generator.integers(LETTERS)), int(generator.integers(8, LONGEST + 1))
        text = generator.permutation(
            [*generator.integers(LETTERS, size=length - length // 3), *[label] * (length // 3)]
        ).tolist()
        most = int(np.bincount(text, minlength=LETTERS).argmax())
        columns["input_ids"].append([letter + 1 for letter in text] + [PADDING] * (LONGEST - length))
        columns["attention_mask"].append([1] * length + [0] * (LONGEST - length))
        columns["labels"].append(most)
    return Columns(columns)
