"""What goes from one process to another comes out as it was, bit for bit, and nothing is left open."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddp.training.parcels import ALIGNMENT_BYTES, pack, unpack

Pair = namedtuple("Pair", "a b")


def there_and_back(value: Any) -> Any:
    file, sizes = pack(value)
    try:
        return unpack(file, sizes)
    finally:
        os.close(file)


TENSORS = [
    torch.arange(105.0).reshape(3, 5, 7),
    torch.arange(24.0).reshape(4, 6).T,  # not contiguous
    torch.arange(24)[::5],
    torch.tensor(3.5),
    torch.empty(0, 3, dtype=torch.int16),
    torch.tensor([True, False, True]),
    torch.tensor([1 + 2j, 3 - 1j]).conj(),
    torch.randn(9, generator=torch.Generator().manual_seed(1)).bfloat16(),
    torch.arange(17, dtype=torch.uint8),
    torch.tensor([torch.nan, -0.0, torch.inf]),
    torch.ones(3, requires_grad=True),
    nn.Parameter(torch.arange(2.0)),
    torch.eye(3).to_sparse(),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.layout}")
def test_tensors_of_all_kinds_come_back(tensor: Tensor) -> None:
    back = there_and_back(tensor)
    assert type(back) is type(tensor)
    assert (back.dtype, back.shape, back.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert back.requires_grad == tensor.requires_grad
    assert torch.equal(back.detach().to_dense().nan_to_num(7), tensor.detach().to_dense().nan_to_num(7))
    if back.layout == torch.strided:
        assert back.data_ptr() % ALIGNMENT_BYTES == 0 or not back.numel()
        back.detach().zero_()  # it is the receiver's own to write in


def test_a_batch_keeps_its_form_and_what_is_no_tensor() -> None:
    same = torch.arange(5)
    batch = {"x": (same, [same, "name", None]), "y": Pair(np.arange(7, dtype=np.uint16), 3), "z": [b"raw"] * 1000}
    back = there_and_back(batch)
    assert type(back["y"]) is Pair and back["y"].b == 3 and back["y"].a.dtype == np.uint16
    assert back["y"].a.tolist() == list(range(7))
    assert back["x"][0] is back["x"][1][0] and back["x"][0].tolist() == [0, 1, 2, 3, 4]
    assert back["x"][1][1:] == ["name", None] and back["z"] == batch["z"]


def test_what_cannot_be_sent_is_an_error_at_once_and_nothing_stays_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises((AttributeError, TypeError), match="lambda|local"):
        pack((torch.ones(3), lambda: 1))
    back = [there_and_back((torch.ones(10_000), step)) for step in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + len(back)  # a mapping may hold one
    del back
    assert len(list(Path("/proc/self/fd").iterdir())) == before
