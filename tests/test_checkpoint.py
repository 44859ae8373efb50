"""Checkpoints: what goes in comes out, bad ones are told, code in them is not run."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints import change_manifest, names, rewrite_manifest, save
from ddp.checkpoint import Metric, find, load, load_shared, newest, read_manifest, resolve, verify
from ddp.checkpoint.plain_tree import flatten, unflatten
from ddp.errors import CheckpointError
from ddp.training.random_state import random_state, restore_random_state
from training_runs import differences

# --- what goes in comes out ---


def test_shared_and_own_come_back_with_types_and_bits(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).to(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    shared = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [(1, 0.1, "word"), (2, float("inf"), None)],
    }
    loaded, _ = load(save(tmp_path, 3, shared=shared), 0)
    assert differences(loaded, shared) == []
    assert [*loaded["optimizer"]["state"]] == [0, 1, 2, 3]
    other = torch.optim.AdamW(model.parameters(), lr=1.0)
    other.load_state_dict(loaded["optimizer"])
    assert differences(other.state_dict(), optimizer.state_dict()) == []


TENSORS = {
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(35).reshape(5, 7).t(),
    "strided": torch.arange(30, dtype=torch.int16)[1::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "bfloat16": torch.randn(7).to(torch.bfloat16),
    "float16": torch.randn(3).half(),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int8": torch.tensor([-128], dtype=torch.int8),
    "int32": torch.tensor([-5], dtype=torch.int32),
    "complex64": torch.tensor([1 - 2j, 0j]),
    "uint32": torch.tensor([0, 2**32 - 1], dtype=torch.uint32),
    "conjugated": torch.tensor([1 - 2j]).conj(),
    "nan": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "__metadata__": torch.ones(1),
    "é\ud800": torch.ones(2),
    7: torch.ones(3),
    "7": torch.ones(4),
}


def test_tensors_of_all_kinds_come_back_and_the_library_reads_them_too(tmp_path: Path) -> None:
    path = save(tmp_path, 1, own=TENSORS)
    own = load(path, 0)[1]
    assert [*own] == [*TENSORS]
    theirs = load_file(path / "rank-00000.safetensors")
    assert len(theirs) == len(TENSORS)
    for name, tensor in TENSORS.items():
        assert (own[name].dtype, own[name].shape) == (tensor.dtype, tensor.shape)
        expected = tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()
        assert own[name].reshape(-1).view(torch.uint8).tolist() == expected
        if isinstance(name, str) and name.isalnum() and name in theirs and name != "7":
            assert theirs[name].reshape(-1).view(torch.uint8).tolist() == expected


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(PLAIN)
@settings(max_examples=150, deadline=None)
def test_plain_values_come_back_exactly(value: Any) -> None:
    tree, tensors = flatten(value, "here", lambda _: False)
    assert tensors == {}
    back = unflatten(json.loads(json.dumps(tree)), {})
    assert _typed(back) == _typed(value)


def test_integers_of_any_size_and_the_bits_of_a_nan(tmp_path: Path) -> None:
    nan = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    own = {"big": -(10**6000), "edge": [2**63 - 1, 2**63, -(2**63), -(2**63) - 1], "nan": nan, "zero": -0.0}
    assert _typed(load(save(tmp_path, 1, own=own), 0)[1]) == _typed(own)


def _typed(value: Any) -> Any:
    """Something that is equal where types, order and bits are."""
    if isinstance(value, dict):
        return type(value), [(_typed(key), _typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_typed(item) for item in value]
    if isinstance(value, float):
        return float, struct.pack(">d", value)
    if isinstance(value, complex):
        return complex, struct.pack(">dd", value.real, value.imag)
    return type(value), value


def _cycle() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"loss": np.float64(1.5)}, r"shared.safetensors: loss: .* not a numpy.float64"),
        ({"a": [1, {2, 3}]}, r"shared.safetensors: a\[1\]: .* not a builtins.set"),
        ({"path": Path("x")}, "not a pathlib"),
        ({"size": torch.Size([3])}, "not a torch.Size"),
        ({"x": torch.eye(3).to_sparse()}, "x: a checkpoint holds dense tensors, not one of sparse_coo float32"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "dense tensors, not one of strided complex128"),
        ({"x": torch.zeros(2, device="meta")}, "dense tensors, .* on meta"),
        ({"x": _cycle()}, "nested too deeply to be saved, or holds itself"),
    ],
)
def test_a_value_that_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, shared=value)
    assert names(tmp_path) == []


def test_random_generators_continue_after_a_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(2)  # the global generator is what a task may use
    random.seed(3)
    random.gauss()  # leaves half a pair behind, which belongs to the state
    np.random.standard_normal()
    path = save(tmp_path, 1, own=random_state())

    def draw() -> list[Any]:
        return [
            torch.rand(5).tolist(),
            np.random.standard_normal(5).tolist(),
            np.random.rand(700).tolist(),
            [random.gauss() for _ in range(3)],
            random.random(),
        ]

    expected = draw()
    assert draw() != expected
    restore_random_state(load(path, 0)[1])
    assert draw() == expected


def test_saving_and_verifying_load_no_torch() -> None:
    code = "import sys, ddp.checkpoint, ddp.checkpoint_command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# --- which one is taken, which ones stay ---


def test_the_newest_is_taken_and_older_ones_go(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    assert newest(directory) is None
    for step in (5, 10, 99_999_999, 100_000_000):
        save(directory, step, keep=3)
    assert newest(directory) == directory / "step-100000000"
    assert names(directory) == ["step-00000010", "step-100000000", "step-99999999"]


@pytest.mark.parametrize(("goal", "best"), [("max", [30, 20]), ("min", [50, 10])])
def test_the_best_stay_beside_the_newest(tmp_path: Path, goal: str, best: list[int]) -> None:
    values = {10: 0.1, 20: 0.7, 30: 0.70001, 40: math.nan, 50: -math.inf, 60: 0.5, 70: 0.5}
    for step, value in values.items():
        save(tmp_path, step, keep=1, keep_best=2, goal=goal, metric=("top 1/accuracy", value))
    path = save(tmp_path, 80, keep=1, keep_best=2, goal=goal)  # none taken at this step
    assert sorted(read_manifest(each).step for each in tmp_path.iterdir()) == sorted([*best, 80])
    assert path.name == "step-00000080"
    if goal == "max":
        assert "step-00000030-top_1_accuracy=0.7" in names(tmp_path)
        assert read_manifest(find(tmp_path, 30)).metric == Metric("top 1/accuracy", 0.70001, "max")


def test_a_metric_that_is_not_finite_is_kept_exactly(tmp_path: Path) -> None:
    for step, value in ((1, math.inf), (2, -math.inf), (3, math.nan), (4, 1e-300)):
        path = save(tmp_path, step, metric=("loss", value), goal="min")
        metric = verify(path).metric
        assert metric is not None
        assert repr(metric.value) == repr(value)
        assert newest(tmp_path) == path


def test_a_path_without_the_metric_is_the_one_checkpoint_of_that_step(tmp_path: Path) -> None:
    path = save(tmp_path, 20, metric=("loss", 0.25))
    save(tmp_path, 200)
    assert find(tmp_path, 20) == resolve(tmp_path / "step-00000020") == path
    assert resolve(tmp_path / "step-00000020-loss") == path
    assert resolve(tmp_path / "step-0000002") == tmp_path / "step-0000002"
    assert resolve(path) == path
    with pytest.raises(CheckpointError, match="no checkpoint of step 21"):
        find(tmp_path, 21)


@pytest.mark.parametrize("metrics", [(None, None), (("loss", 0.5), ("loss", 0.25)), (None, ("loss", 0.5))])
def test_saving_a_step_again_replaces_it(tmp_path: Path, metrics: tuple[Any, Any]) -> None:
    for word, metric in zip(("first", "second"), metrics, strict=True):
        save(tmp_path, 7, own={"word": word}, metric=metric)
    path = newest(tmp_path)
    assert path is not None
    assert load(path, 0)[1] == {"word": "second"}
    assert names(tmp_path) == [path.name]


def test_one_that_gave_way_is_found_if_the_new_one_never_got_its_name(tmp_path: Path) -> None:
    path = save(tmp_path, 7, metric=("loss", 0.5))
    replaced = path.rename(tmp_path / f"{path.name}.replaced")
    assert newest(tmp_path) == find(tmp_path, 7) == resolve(tmp_path / "step-00000007") == replaced
    save(tmp_path, 7)
    assert names(tmp_path) == ["step-00000007"]


def test_newer_ones_go_after_going_back_even_the_best(tmp_path: Path) -> None:
    for step in (30, 40, 50):
        save(tmp_path, step, keep=9, keep_best=1, metric=("accuracy", step))
    save(tmp_path, 35, keep=9, keep_best=1)
    assert [name[:13] for name in names(tmp_path)] == ["step-00000030", "step-00000035"]


def test_everything_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    modes = [oct(entry.stat().st_mode & 0o777) for entry in (path.parent, path, *sorted(path.iterdir()))]
    assert modes == ["0o700", "0o700", "0o600", "0o600", "0o600"]


# --- bad ones ---


def _truncate(path: Path) -> None:
    file = path / "shared.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "rank-00000.safetensors").write_bytes(content)


def _link(path: Path) -> None:
    file = path / "shared.safetensors"
    file.rename(path.parent.parent / "elsewhere")
    file.symlink_to(path.parent.parent / "elsewhere")


def _fifo(path: Path) -> None:
    (path / "shared.safetensors").unlink()
    os.mkfifo(path / "shared.safetensors")


def _manifest_that_points_out(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["../step-00000001/shared.safetensors"] = files.pop("shared.safetensors")
    change_manifest(path, files=files)


def _huge_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", (16 << 20) + 1)


def _bad_hash(path: Path) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["shared.safetensors"]["sha256"] = "A" * 64
    change_manifest(path, files=files)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (_truncate, r"shared.safetensors: \d+ bytes where \d+ were written"),
    (_flip_a_bit, r"rank-00000.safetensors: its content has changed"),
    (lambda path: (path / "shared.safetensors").unlink(), "shared.safetensors: cannot be opened: No such file"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json: cannot be opened: No such file"),
    (lambda path: (path / "manifest.json").write_text("{}"), "not a checkpoint's manifest: version is no number"),
    (lambda path: (path / "manifest.json").write_text("{"), "not a checkpoint's manifest"),
    (lambda path: (path / "manifest.json").write_text("[" * 100_000), "not a checkpoint's manifest"),
    (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "not a checkpoint's manifest"),
    (lambda path: change_manifest(path, version=99), "version 99"),
    (lambda path: change_manifest(path, version=1), "version 1, .* reads version 3; start a new run"),
    (lambda path: change_manifest(path, version=2), "version 2, .* reads version 3; start a new run"),
    (lambda path: change_manifest(path, version=True), "version is no number"),
    (lambda path: change_manifest(path, step=-1), "step is no number from 0"),
    (lambda path: change_manifest(path, step=2.0), "step is no number from 0"),
    (lambda path: change_manifest(path, world_size=2), r"does not name the files of 2 rank\(s\)"),
    (lambda path: change_manifest(path, world_size=10**9), "world_size is no number"),
    (lambda path: change_manifest(path, more=1), "unknown key 'more'"),
    (lambda path: change_manifest(path, metric={"name": 1}), "metric without name"),
    (lambda path: change_manifest(path, files=[]), "files is no table"),
    (_manifest_that_points_out, "outside the checkpoint"),
    (_huge_manifest, "not a checkpoint's manifest: over 16777216 bytes"),
    (_bad_hash, "SHA-256 that is none"),
    (_link, "shared.safetensors: cannot be opened: Too many levels of symbolic links"),
    (_fifo, "shared.safetensors: not a plain file"),
    (lambda path: (path / "shared.safetensors").chmod(0o666), "shared.safetensors: every user may write to it"),
    (lambda path: path.chmod(0o777), "step-00000002: every user may write to it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_bad_one_is_told_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "checkpoints"
    good, bad = save(directory, 1), save(directory, 2)
    verify(bad)
    damage(bad)
    with pytest.raises(CheckpointError, match=message) as refused:
        load(bad, 0)
    assert str(bad) in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert newest(directory) == good
    assert "passing over" in caplog.text
    assert str(bad) in caplog.text


def test_who_asks_is_told_which_were_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    told: list[str] = []
    assert newest(tmp_path, log=told.append) == good
    assert len(told) == 1 and "step-00000002/manifest.json: cannot be opened" in told[0]
    assert caplog.text == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    os.chown(path / "shared.safetensors", 12345, -1)
    with pytest.raises(CheckpointError, match=r"shared.safetensors: belongs to user 12345, not to you"):
        load(path, 0)


def test_a_folder_that_every_user_may_write_to_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    path = save(directory, 1)
    directory.chmod(0o1777)
    assert newest(directory) == path
    directory.chmod(0o777)
    with pytest.raises(CheckpointError, match="checkpoints: every user may replace what is in it"):
        load(path, 0)
    with pytest.raises(CheckpointError, match="checkpoints: every user may replace what is in it"):
        save(directory, 2)
    assert names(directory) == ["step-00000001"]


def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "step-00000001", 0)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "nothing" / "step-\0", 0)


# --- crafted ones, whose hashes are right ---


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "checkpoints", 1)
    refused = r"shared\.safetensors: holds something else than tensors and plain values"
    with (path / "shared.safetensors").open("wb") as file:
        torch.save({"model": _Bomb()}, file)
    rewrite_manifest(path, "shared.safetensors")
    assert newest(tmp_path / "checkpoints") == path  # nothing but its content is wrong with it
    with pytest.raises(CheckpointError, match=refused):
        load_shared(path)
    (path / "shared.safetensors").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    rewrite_manifest(path, "shared.safetensors")
    with pytest.raises(CheckpointError, match=refused):
        load(path, 0)
    assert not (tmp_path / "exploded").exists()


def _crafted(path: Path, content: bytes) -> str:
    (path / "shared.safetensors").write_bytes(content)
    rewrite_manifest(path, "shared.safetensors")
    with pytest.raises(CheckpointError) as refused:
        load_shared(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


def _file(table: Any, data: bytes = b"", tree: str | None = '{"dict":[]}') -> bytes:
    if tree is not None:
        table = {"__metadata__": {"ddp_tree": tree}, **table}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def _tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = bytes(8)
LIES: list[tuple[bytes, str]] = [
    (b"", "length of its header"),
    (b"\0" * 7, "length of its header"),
    ((1 << 63).to_bytes(8, "little") + b"{}", "length of its header"),
    (((1 << 64) - 1).to_bytes(8, "little") + b"{}", "length of its header"),
    (b"\x02" + bytes(7) + b"[]", "not of this form"),
    (b"\x02" + bytes(7) + b"\xff\xff", "codec"),
    ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not of this form"),
    (_file({}, tree=None), "not of this form"),
    (_file({"__metadata__": {"ddp_tree": [1]}}, tree=None), "not of this form"),
    (_file({"a": _tensor(offsets=(0, 16), shape=(4,))}, EIGHT), "16 bytes, and the file has 8"),
    (_file({"a": _tensor()}, EIGHT + EIGHT), "8 bytes, and the file has 16"),
    (_file({"a": _tensor(shape=(3,))}, EIGHT), "'a' does not fill"),
    (_file({"a": _tensor(shape=(2**40, 2**40))}, EIGHT), "'a' does not fill"),
    (_file({"a": _tensor(shape=(2**80,))}, EIGHT), "'a' has a size"),
    (_file({"a": _tensor(shape=(-2,), offsets=(8, 0))}, EIGHT), "'a' has a size"),
    (_file({"a": _tensor(shape=(2.0,))}, EIGHT), "'a' has a size"),
    (_file({"a": _tensor(shape=(True, 2))}, EIGHT), "'a' has a size"),
    (_file({"a": _tensor(shape=[1] * 65 + [2])}, EIGHT), "'a' has a shape or a dtype"),
    (_file({"a": _tensor(dtype="F31")}, EIGHT), "'a' has a shape or a dtype"),
    (_file({"a": _tensor(dtype=["F32"])}, EIGHT), "not of this form"),
    (_file({"a": _tensor(offsets=(0, 8, 9))}, EIGHT), "unpack"),
    (_file({"a": _tensor(), "b": _tensor(offsets=(4, 12))}, EIGHT + EIGHT[:4]), "overlap or leave a gap at 'b'"),
    (
        _file({"a": _tensor(), "b": _tensor(offsets=(12, 20))}, EIGHT + EIGHT + EIGHT[:4]),
        "overlap or leave a gap at 'b'",
    ),
    (_file({"a": _tensor()}, EIGHT, '{"tensor":"b"}'), "KeyError"),
    (_file({"a": _tensor()}, EIGHT, "{"), "Expecting"),
    (_file({"a": _tensor(dtype="F32", shape=(0, 2**62), offsets=(0, 0))}, tree='{"tensor":"a"}'), ""),
    (_file({}, tree="[1]"), "holds no table"),
    (_file({}, tree='{"code":"x"}'), "unknown tag 'code'"),
    (_file({}, tree='{"int":"x"}'), "invalid literal"),
    (_file({}, tree='{"int":5}'), "TypeError"),
    (_file({}, tree='{"float":"00"}'), "requires a buffer"),
    (_file({}, tree='{"dict":[[[1],2]]}'), "unhashable"),
    (_file({}, tree='{"dict":[1]}'), "TypeError"),
    (_file({}, tree='{"dict":[],"tuple":[]}'), "unpack"),
    (_file({}, tree="[" * 90_000 + "]" * 90_000), "not of this form"),
]


@pytest.mark.parametrize(("content", "message"), LIES, ids=range(len(LIES)))
def test_a_header_that_lies_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in _crafted(save(tmp_path, 1), content)


def test_a_file_of_the_librarys_without_a_tree_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "other")
    assert "not of this form" in _crafted(save(tmp_path, 1), (tmp_path / "other").read_bytes())


@given(st.binary(max_size=80), st.integers(min_value=0, max_value=10_000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_in_a_part_are_more_than_a_clear_message(tmp_path: Path, noise: bytes, at: int) -> None:
    path = tmp_path / "step-00000001"
    if not path.exists():
        save(tmp_path, 1)
        (tmp_path / "whole").write_bytes((path / "shared.safetensors").read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    at %= len(content)
    content[at : at + len(noise)] = noise
    (path / "shared.safetensors").write_bytes(content)
    rewrite_manifest(path, "shared.safetensors")
    try:
        assert isinstance(load_shared(path), dict)
    except CheckpointError as refused:
        assert str(path) in str(refused)


def test_metadata_of_a_part_is_one_text(tmp_path: Path) -> None:
    with safe_open(save(tmp_path, 1) / "shared.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ddp_tree"]) == {"dict": [["weight", {"tensor": "weight"}]]}
