"""IDX files: what numpy reads of them by itself, and headers and files that are not what they say."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from ddp.errors import UsageError
from ddp.tasks.idx import read_idx, write_idx
from ddp.tasks.idx_folder import find_idx_files

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 3)).astype(np.uint8)
GOOD = struct.pack(">BBBB3I", 0, 0, 8, 3, 7, 5, 3) + IMAGES.tobytes()


@pytest.mark.parametrize("name", ["plain", "packed.gz"])
def test_what_is_written_is_read_by_numpy_alone_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_idx(path, IMAGES)
    content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert content == GOOD
    alone = np.frombuffer(content, np.uint8, offset=16).reshape(np.frombuffer(content, ">u4", 3, offset=4).tolist())
    read = read_idx(path, dimensions=3)
    assert np.array_equal(read, alone)
    assert read.flags.writeable  # memory of its own


def test_the_content_says_whether_it_is_gzipped_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "unpacked.gz").write_bytes(GOOD)
    (tmp_path / "packed").write_bytes(gzip.compress(GOOD))
    (tmp_path / "link").symlink_to("packed")
    for name in ("unpacked.gz", "packed", "link"):
        assert np.array_equal(read_idx(tmp_path / name, dimensions=3), IMAGES)


HUGE = struct.pack(">BBBB3I", 0, 0, 8, 3, *[(1 << 32) - 1] * 3)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin as an IDX file"),
    "text": (b"hello, this is no image file", "does not begin as an IDX file"),
    "floats": (struct.pack(">BBBB3I", 0, 0, 0x0D, 3, 7, 5, 3) + bytes(420), "of type 0x0d"),
    "labels": (struct.pack(">BBBBI", 0, 0, 8, 1, 4) + bytes(4), "it has 1 dimension, where 3 are wanted"),
    "dimensions": (struct.pack(">BBBB", 0, 0, 8, 255) + bytes(1020), "it has 255 dimensions"),
    "header": (GOOD[:11], "cut short within its header"),
    "nothing": (struct.pack(">BBBB3I", 0, 0, 8, 3, 7, 0, 3), "7 x 0 x 3 values: none"),
    "huge": (HUGE + bytes(100), "4294967295 x 4294967295 x 4294967295 values, more than there can be"),
    "huge, gzipped": (gzip.compress(HUGE + bytes(100)), "more than there can be"),
    "short": (GOOD[:-1], "more than there can be in it"),
    "short, gzipped": (gzip.compress(GOOD[:-1]), "it holds 104 values and says 105"),
    "long": (GOOD + b"x", "more follows after the 7 x 5 x 3 values"),
    "long, gzipped": (gzip.compress(GOOD + b"x"), "more follows after"),
    "cut, gzipped": (gzip.compress(GOOD)[:-30], "cut short"),
    "damaged, gzipped": (gzip.compress(GOOD)[:-8] + bytes(8), "CRC check failed"),
    "spoilt, gzipped": (gzip.compress(GOOD)[:12] + b"\xff" * 40 + gzip.compress(GOOD)[52:], "cannot read it as IDX"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"task.path: {path}: cannot read it as IDX: .*{message}|{message}"):
        read_idx(path, dimensions=3)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, message in (
        ("pipe", "not a plain file"),
        (".", "Is a directory"),
        ("dangling", "No such file"),
        ("none", "No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            read_idx(tmp_path / name, dimensions=3)
    with pytest.raises(UsageError, match="not a plain file"):
        read_idx(Path("/dev/zero"), dimensions=3)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_files_are_found_by_the_names_of_mnist_and_emnist(tmp_path: Path) -> None:
    assert find_idx_files(tmp_path, None) is None
    touch(tmp_path, "README", "emnist-letters-mapping.txt")
    assert find_idx_files(tmp_path, None) is None
    touch(
        tmp_path,
        *(f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels.idx1-ubyte")),
    )
    touch(tmp_path, "train-images-idx3-ubyte.gz")
    found = find_idx_files(tmp_path, None)
    assert found is not None and found.prefix == "" and found.validation is not None
    assert {each.name for each in (*found.training.values(), *found.validation.values())} == {
        "train-images-idx3-ubyte",
        "train-labels.idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels.idx1-ubyte",
    }
    touch(tmp_path, "emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte.gz")
    with pytest.raises(UsageError, match="task.prefix: .* several sets .*choose one of '', 'emnist-letters'"):
        find_idx_files(tmp_path, None)
    with pytest.raises(
        UsageError, match="no IDX files that begin with 'emnist-digits'; there are '', 'emnist-letters'"
    ):
        find_idx_files(tmp_path, "emnist-digits")
    letters = find_idx_files(tmp_path, "emnist-letters")
    assert letters is not None and letters.validation is None
    assert letters.training["images"].name == "emnist-letters-train-images-idx3-ubyte.gz"
    touch(tmp_path, "emnist-letters-test-images-idx3-ubyte.gz")
    with pytest.raises(
        UsageError, match="no validation labels: a file named like emnist-letters-t10k-labels-idx1-ubyte"
    ):
        find_idx_files(tmp_path, "emnist-letters")
