"""Batches that are dictionaries: of columns, of examples that are dictionaries, of named tuples."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ddp.errors import UsageError
from ddp.tasks.base import TensorExamples
from ddp.training.columns import collate, column
from ddp.training.data import fetcher, to_device
from ddp.training.parcels import pack, unpack


class LikeDatasets(Dataset[Any]):
    """As `datasets.Dataset` is documented: an index gives one example, a list or a slice a dictionary of columns."""

    def __init__(self, as_tensors: bool) -> None:
        ids = torch.arange(24).view(8, 3)
        self.as_tensors = as_tensors
        self.columns: dict[str, Any] = {
            "input_ids": ids.tolist(),
            "score": [i / 2 for i in range(8)],
            "labels": [0, 1] * 4,
        }

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        if isinstance(key, int):
            return {name: self._formatted(values[key]) for name, values in self.columns.items()}
        rows = range(8)[key] if isinstance(key, slice) else key
        return {name: self._formatted([values[row] for row in rows]) for name, values in self.columns.items()}

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """What it gives torch's own loader."""
        columns = self[keys]
        return [{name: values[i] for name, values in columns.items()} for i in range(len(keys))]

    def _formatted(self, value: Any) -> Any:
        return torch.tensor(value) if self.as_tensors else value


class Dictionaries(LikeDatasets):
    """The same, one example at a time or several as a list of dictionaries; without columns."""

    column_names = None  # type: ignore[assignment]


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("kind", [LikeDatasets, Dictionaries])
@pytest.mark.parametrize("part", [False, True])
def test_a_batch_has_one_row_an_example(kind: type[LikeDatasets], as_tensors: bool, part: bool) -> None:
    dataset: Any = kind(as_tensors)
    indices = [5, 0, 5, 7]
    if part:
        dataset, indices = Subset(dataset, [7, 5, 0]), [1, 2, 1, 0]
    batch = fetcher(dataset)(indices)
    assert list(batch) == ["input_ids", "score", "labels"]
    assert batch["input_ids"].tolist() == [[15, 16, 17], [0, 1, 2], [15, 16, 17], [21, 22, 23]]
    assert batch["labels"].tolist() == [1, 0, 1, 1] and batch["labels"].dtype == torch.int64
    assert batch["score"].tolist() == [2.5, 0.0, 2.5, 3.5] and batch["score"].dtype == torch.float32


def test_a_part_makes_batches_as_its_data_set_does() -> None:
    part = Subset(TensorExamples(torch.arange(6), torch.arange(6) * 10), [4, 2, 0])
    first, second = fetcher(part)([0, 2])
    assert first.tolist() == [4, 0] and second.tolist() == [40, 0]


def test_columns_of_every_kind() -> None:
    array, words = np.arange(6, dtype=np.float32).reshape(3, 2), ["a", "b", "c"]
    batch = collate(
        {
            "array": array,
            "tensor": torch.ones(3),
            "arrays": list(array),
            "nested": [[[1], [2]], [[3], [4]], [[5], [6]]],
            "words": words,
            "spans": [["a", "b"], ["c"], []],
            "flags": [True, False, True],
            "inner": [{"x": 1}, {"x": 2}, {"x": 3}],
            "missing": [None, None, None],
            "scalars": list(np.arange(3)),
        }
    )
    assert torch.equal(batch["array"], batch["arrays"]) and batch["tensor"].tolist() == [1, 1, 1]
    assert batch["nested"].shape == (3, 2, 1) and batch["flags"].tolist() == [True, False, True]
    assert batch["words"] == words and batch["spans"] == [["a", "b"], ["c"], []] and batch["missing"] == [None] * 3
    assert batch["inner"]["x"].tolist() == [1, 2, 3] and batch["scalars"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "rows", [[[1, 2], [3]], [torch.ones(2), torch.ones(3)], [1, "a"], [[1, 2], 3], [np.ones(2), np.ones(1)]]
)
def test_rows_that_do_not_fit(rows: list[Any]) -> None:
    with pytest.raises(UsageError, match="the rows of column 'input_ids' do not make one tensor .*pad them"):
        column("input_ids", rows)


def test_examples_with_other_keys() -> None:
    with pytest.raises(UsageError, match="different keys; the first has a"):
        collate([{"a": 1}, {"b": 1}])


class Point(NamedTuple):
    inputs: Tensor
    target: int


def test_named_tuples_and_dictionaries_of_a_users_own_go_through_workers_and_to_devices() -> None:
    batch = collate([Point(torch.ones(2), 3), Point(torch.zeros(2), 4)])
    assert isinstance(batch, Point) and batch.target.tolist() == [3, 4]  # type: ignore[attr-defined]
    encoding = UserDict(input_ids=torch.arange(4), nested={"more": Point(torch.ones(1), 0)})
    file, sizes = pack({"batch": batch, "encoding": dict(encoding)})
    unpacked = unpack(file, sizes)
    assert torch.equal(unpacked["batch"].inputs, batch.inputs)
    moved = to_device(encoding, torch.device("cpu"))
    assert torch.equal(moved["input_ids"], torch.arange(4)) and isinstance(moved["nested"]["more"], Point)


class Plain(Dataset[tuple[Sequence[float], int]]):
    def __getitem__(self, index: int) -> tuple[Sequence[float], int]:
        return [index, index + 1.0], index


def test_examples_that_are_no_dictionaries_are_collated_as_torch_does() -> None:
    from torch.utils.data import default_collate

    found, expected = fetcher(Plain())([0, 1]), default_collate([Plain()[0], Plain()[1]])
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1], expected[1])
