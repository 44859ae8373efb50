"""torch's tensors as bytes in staging memory, and back. The one module of checkpoints that loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddp.errors import CheckpointError

_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_NAME_OF = {getattr(torch, name): short for name, short in _NAMES.items() if hasattr(torch, name)}
_DTYPE_OF = {short: dtype for dtype, short in _NAME_OF.items()}


def is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor)


def describe(tensor: Tensor, where: str) -> tuple[str, tuple[int, ...]]:
    """Its dtype as the file calls it, and its shape.

    Raises:
        CheckpointError: it has no plain elements of a dtype that safetensors knows.
    """
    name = _NAME_OF.get(tensor.dtype)
    if name is None or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = f"{str(tensor.layout).removeprefix('torch.')} {str(tensor.dtype).removeprefix('torch.')}"
        raise CheckpointError(f"{where}: a checkpoint holds dense tensors, not one of {kind} on {tensor.device}")
    return name, tuple(tensor.shape)


def copy_into(memory: memoryview, tensor: Tensor) -> None:
    """Copy the elements, row after row, from whatever strides and device."""
    target = torch.frombuffer(memory, dtype=tensor.dtype)
    target.view(tensor.shape).copy_(tensor.detach())


def make(dtype: str, shape: tuple[int, ...]) -> tuple[Tensor, memoryview]:
    """A tensor on the CPU to read into, and its memory.

    Raises:
        ValueError: this torch has no such dtype, or no such shape.
    """
    if dtype not in _DTYPE_OF:
        raise ValueError(f"this torch knows no {dtype}")
    try:
        tensor = torch.empty(shape, dtype=_DTYPE_OF[dtype])
    except (RuntimeError, TypeError, OverflowError) as fault:
        raise ValueError(str(fault)) from None
    return tensor, tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors alike, in float64 on the way, as evaluation averages running statistics."""
    total = torch.stack([tensor.double() for tensor in tensors]).sum(dim=0)
    return (total / len(tensors)).to(tensors[0].dtype)
