"""Examples of an iterable data set kept in memory, where they are wanted by number: for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

from torch.utils.data import Dataset

from ddp.errors import UsageError
from ddp.training.random_state import preserved_random_state
from ddp.training.stream import is_stream

MOST_VALIDATION_EXAMPLES = 1_000_000  # of an iterable; more is taken for no end
STREAM_SAMPLE_EXAMPLES = 1_000


class Kept(Dataset[Any]):
    """Examples in a list, made into batches as the data set that they come from has it."""

    def __init__(self, examples: list[Any], source: Any) -> None:
        self.examples = examples
        if hasattr(source, "collate"):
            self.collate = source.collate

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


def finite(dataset: Dataset[Any]) -> Dataset[Any]:
    """The validation set by number: as it is, or all of an iterable one.

    Raises:
        UsageError: it does not end.
    """
    if not is_stream(dataset):
        return dataset
    examples = _first(dataset, MOST_VALIDATION_EXAMPLES + 1)
    if len(examples) > MOST_VALIDATION_EXAMPLES:
        raise UsageError(
            f"task: the validation set, an iterable, has not ended after {MOST_VALIDATION_EXAMPLES:,} examples: it is kept in "
            "memory, so give a part of it"
        )
    return Kept(examples, dataset)


def sample_of_stream(dataset: Dataset[Any], size: int) -> Dataset[Any]:
    """Its first `size` examples, a thousand at most, which are trained on as well."""
    examples = _first(dataset, min(size, STREAM_SAMPLE_EXAMPLES))
    if not examples:
        raise UsageError("task: the training stream has no examples")
    return Kept(examples, dataset)


def _first(dataset: Dataset[Any], count: int) -> list[Any]:
    with preserved_random_state():
        return list(islice(cast(Iterable[Any], dataset), count))
