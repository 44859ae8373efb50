"""IDX files, the format of MNIST and its kin: two zeros, a type, the number of dimensions, the sizes, the values.

Read with nothing but numpy, plain or gzipped. A file may come from anywhere: what its header claims is compared with what
the file can hold before memory is taken for it.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddp.errors import UsageError
from ddp.job import opened_plain_file

UNSIGNED_BYTE = 0x08
GZIP = b"\x1f\x8b"
MOST_BYTES = 1 << 36  # of values: a hundred times the largest set of this kind
LARGEST_RATIO = 1032  # that deflate can compress by (zlib's technical details)
PIECE_BYTES = 1 << 20


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The values in `path`, uint8, of the shape that its header states; memory of its own.

    Args:
        dimensions: how many the array has to have.

    Raises:
        UsageError: it cannot be read, is not such a file, holds less or more than it says, or is damaged.
    """
    try:
        with opened_plain_file(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            length = os.fstat(descriptor).st_size
            if file.peek(len(GZIP))[: len(GZIP)] != GZIP:
                return _read(file, dimensions, length)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read(unpacked, dimensions, LARGEST_RATIO * length)
    except EOFError:
        raise _fault(path, "it is cut short") from None
    except (OSError, ValueError, zlib.error) as error:
        raise _fault(path, getattr(error, "strerror", None) or str(error)) from None


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """The file that `read_idx` gives `values` back from; gzipped where its name ends in .gz."""
    magic = bytes((0, 0, UNSIGNED_BYTE, values.ndim))
    content = magic + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _read(file: BinaryIO | gzip.GzipFile, dimensions: int, most_bytes: int) -> NDArray[np.uint8]:
    """`most_bytes`: more cannot come, header included."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError("it does not begin as an IDX file does")
    kind, found = magic[2], magic[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(f"its values are of type 0x{kind:02x}; those of images and labels are bytes, 0x08")
    if found != dimensions:
        raise ValueError(f"it has {found} dimension{'s' * (found != 1)}, where {dimensions} are wanted")
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise ValueError("it is cut short within its header")
    shape = struct.unpack(f">{dimensions}I", header)
    total, text = math.prod(shape), " x ".join(map(str, shape))
    if total == 0:
        raise ValueError(f"it says that it holds {text} values: none")
    if total > min(MOST_BYTES, most_bytes - 4 - 4 * dimensions):
        raise ValueError(f"it says that it holds {text} values, more than there can be in it")
    values = np.empty(total, dtype=np.uint8)  # its pages are the machine's only once they are written to
    _fill(file, values.data)
    if file.read(1):
        raise ValueError(f"more follows after the {text} values that it says it holds")
    return values.reshape(shape)


def _fill(file: BinaryIO | gzip.GzipFile, values: memoryview) -> None:
    done = 0
    while done < len(values):
        piece = file.readinto(values[done : done + PIECE_BYTES])  # type: ignore[union-attr]
        if not piece:
            raise ValueError(f"it holds {done:,} values and says {len(values):,}")
        done += piece


def _fault(path: Path, what: str) -> UsageError:
    return UsageError(f"task.path: {path}: cannot read it as IDX: {what}")
