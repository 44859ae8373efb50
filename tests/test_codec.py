"""Messages in every wire format, against numpy and torch: what arrives, what is lost, what is kept, what is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp.transport import message
from ddp.transport.codec import BFLOAT16, BLOCK, FLOAT16, FLOAT32, FLOAT64, INT8, SCALED_FLOAT16, wire_kind
from ddp.transport.message import HEADER_BYTES, NO_RESULT, NOT_MEASURED, WHOLE_ONLY, message_bytes

DTYPES = {FLOAT64: torch.float64, FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16}
KINDS = (FLOAT32, BFLOAT16, FLOAT16, SCALED_FLOAT16, INT8)
NAMES = {FLOAT64: "float64", FLOAT32: "float32", BFLOAT16: "bfloat16", FLOAT16: "float16"} | {
    SCALED_FLOAT16: "scaled float16",
    INT8: "int8",
}
SIZES = (0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 13)
WORKSPACE = np.zeros(message.WORKSPACE_BYTES, np.uint8)


@dataclass
class Sums:
    """Bounds of parameters and their sums, as the kernels take them."""

    ends: NDArray[np.int64]
    sums: NDArray[np.float64]

    @classmethod
    def of(cls, *lengths: int) -> Sums:
        return cls(np.cumsum(lengths, dtype=np.int64), np.zeros(len(lengths)))


def encode(
    source: Tensor,
    kind: int,
    weight: float = 1.0,
    residual: NDArray[np.float32] | None = None,
    measure: Sums | None = None,
    position: int = 0,
) -> tuple[NDArray[np.uint8], float]:
    written = np.zeros(message_bytes(kind, len(source)) + 8, np.uint8)
    written[-8:] = 77
    own = next(kind for kind, dtype in DTYPES.items() if dtype == source.dtype)
    total = message.encode(
        own,
        source.data_ptr(),
        len(source),
        weight,
        kind,
        written.ctypes.data,
        12345,
        0 if residual is None else residual.ctypes.data,
        WORKSPACE.ctypes.data,
        0 if measure is None else measure.ends.ctypes.data,
        WHOLE_ONLY if measure is None else len(measure.ends),
        position,
        0 if measure is None else measure.sums.ctypes.data,
    )
    assert (written[-8:] == 77).all(), "wrote beyond the message"
    return written[:-8], total


def reduce(
    messages: list[NDArray[np.uint8]],
    kind: int,
    length: int,
    target: torch.dtype = torch.float32,
    result_kind: int = NO_RESULT,
    residual: NDArray[np.float32] | None = None,
    measure: Sums | None = None,
    bucket_length: int = 12345,
) -> tuple[Tensor, float, NDArray[np.uint8]]:
    out = torch.full((length,), -7.0, dtype=target)
    addresses = np.array([each.ctypes.data for each in messages])
    result = np.zeros(message_bytes(max(result_kind, 0), length), np.uint8)
    total = message.reduce(
        kind,
        addresses.ctypes.data,
        len(messages),
        next(kind for kind, dtype in DTYPES.items() if dtype == target),
        out.data_ptr(),
        length,
        result_kind,
        result.ctypes.data if result_kind != NO_RESULT else 0,
        bucket_length,
        0 if residual is None else residual.ctypes.data,
        WORKSPACE.ctypes.data,
        0 if measure is None else measure.ends.ctypes.data,
        WHOLE_ONLY if measure is None else len(measure.ends),
        0,
        0 if measure is None else measure.sums.ctypes.data,
    )
    return out, total, result


def numbers(size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Of several magnitudes a block."""
    generator = torch.Generator().manual_seed(100 * size + seed)
    spread = torch.exp(2 * torch.randn(size, generator=generator))
    return scale * spread * torch.randn(size, generator=generator)


def block_maximum(values: Tensor) -> Tensor:
    """For each element the largest magnitude of its block."""
    return torch.cat([part.abs().max().expand(len(part)) for part in values.split(BLOCK)]) if len(values) else values


def bound(kind: int, values: Tensor) -> Tensor:
    """The largest error that a kind may make of each value."""
    if kind == INT8:
        return block_maximum(values) * (0.5 / 127) * 1.001
    if kind == SCALED_FLOAT16:
        return torch.maximum(values.abs() * 2**-11, block_maximum(values) * 2**-38)
    bits = {FLOAT64: 53, FLOAT32: 24, BFLOAT16: 8, FLOAT16: 11}[kind]
    return torch.maximum(values.abs() * 2.0**-bits, torch.tensor(2.0**-25 if kind == FLOAT16 else 0.0))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
@pytest.mark.parametrize("size", SIZES)
def test_what_arrives_is_within_the_formats_precision(kind: int, size: int) -> None:
    values = numbers(size)
    written, total = encode(values, kind, weight=0.75)
    arrived, after, _ = reduce([written], kind, size)
    expected = 0.75 * values.double()
    assert bool(((arrived - expected).abs() <= bound(kind, expected)).all())
    assert total == pytest.approx(float(values.double().square().sum()), rel=2e-6)
    assert after == pytest.approx(float(arrived.double().square().sum()), rel=2e-6)


@pytest.mark.parametrize(("kind", "dtype"), DTYPES.items(), ids=[NAMES[kind] for kind in DTYPES])
def test_the_gradients_own_format_is_exact(kind: int, dtype: torch.dtype) -> None:
    """Also of a weight that is no power of two: the numbers travel as they are, and are weighted in wider ones."""
    parts = [numbers(2 * BLOCK + 5, seed).to(dtype) for seed in range(3)]
    weights = (0.3, 0.45, 0.25)
    messages = [encode(part, kind, weight)[0] for part, weight in zip(parts, weights, strict=True)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [torch.tensor(weight, dtype=wide) for weight in weights]
    expected = (factors[0] * parts[0].to(wide) + factors[1] * parts[1].to(wide)) + factors[2] * parts[2].to(wide)
    out, total, _ = reduce(messages, kind, len(parts[0]), dtype)
    assert torch.equal(out, expected.to(dtype))
    assert total == pytest.approx(float(out.double().square().sum()), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_as_int8(dtype: torch.dtype) -> None:
    values = numbers(3000).to(dtype)
    residual = np.zeros(3000, np.float32)
    written, _ = encode(values, INT8, 0.5, residual)
    arrived, _, _ = reduce([written], INT8, 3000)
    assert torch.allclose(arrived.double() + torch.from_numpy(residual).double(), 0.5 * values.double(), rtol=1e-6)
    assert np.abs(residual).max() > 0


def test_plain_numbers_are_rounded_as_torch_rounds_them() -> None:
    values = torch.cat([numbers(5000), numbers(5000, 1, 1e-6), torch.tensor([0.0, -0.0, 1e-45, 65520.0, 3.4e38])])
    for kind in (BFLOAT16, FLOAT16):
        arrived, _, _ = reduce([encode(values, kind)[0]], kind, len(values))
        assert torch.equal(arrived, values.to(DTYPES[kind]).float())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-7, 1.0, 1e30])
def test_scaled_float16_keeps_its_precision_at_any_magnitude(scale: float) -> None:
    values = scale * (1 + torch.rand(3000, generator=torch.Generator().manual_seed(1)))
    arrived, _, _ = reduce([encode(values, SCALED_FLOAT16)[0]], SCALED_FLOAT16, 3000)
    assert float(((arrived - values) / values).abs().max()) <= 2**-11


@pytest.mark.parametrize("kind", KINDS, ids=NAMES.get)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_arrives_as_such(kind: int, bad: float) -> None:
    values = numbers(3 * BLOCK)
    values[BLOCK + 5] = bad
    residual = np.ones(3 * BLOCK, np.float32)
    written, total = encode(values, kind, residual=residual if kind == INT8 else None)
    arrived, after, _ = reduce([written], kind, 3 * BLOCK)
    assert not math.isfinite(total) and not math.isfinite(after)
    assert not math.isfinite(float(arrived[BLOCK + 5]))
    assert bool(arrived[:BLOCK].isfinite().all() and arrived[2 * BLOCK :].isfinite().all())
    if kind == INT8:
        assert bool(arrived[BLOCK : 2 * BLOCK].isnan().all())
        assert (residual[BLOCK : 2 * BLOCK] == 0).all()  # else no later step would be finite
    else:
        assert arrived[BLOCK + 5] == bad or math.isnan(bad)
        assert int(arrived.isfinite().sum()) == 3 * BLOCK - 1


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-35, 1.5, 3.4028234e38])
def test_int8_at_the_ends_of_float32(magnitude: float) -> None:
    values = torch.tensor([magnitude, -magnitude, magnitude / 3])
    residual = np.zeros(3, np.float32)
    written, _ = encode(values, INT8, residual=residual)
    arrived, _, _ = reduce([written], INT8, 3)
    assert bool((arrived.abs() <= magnitude).all())
    assert torch.allclose(arrived.double() + torch.from_numpy(residual).double(), values.double(), rtol=1e-6, atol=0)


def test_error_feedback_loses_nothing_over_the_steps() -> None:
    """The sum of what arrived differs from the sum of what was sent by the last residual alone."""
    residual = np.zeros(2500, np.float32)
    sent = arrived = torch.zeros(2500, dtype=torch.float64)
    for step in range(50):
        values = numbers(2500, step)
        sent = sent + values
        arrived = arrived + reduce([encode(values, INT8, residual=residual)[0]], INT8, 2500)[0]
    assert torch.allclose(arrived + torch.from_numpy(residual), sent, atol=2e-3)
    assert float((sent - arrived).abs().max()) > 1e-2  # the residual is what makes up for it
    largest = max(float(numbers(2500, step).abs().max()) for step in range(50))
    assert float((sent - arrived).abs().max()) < largest / 100  # about half a step of the coarsest block


@pytest.mark.parametrize("result_kind", KINDS, ids=NAMES.get)
def test_the_owner_of_a_sum_holds_what_its_readers_get(result_kind: int) -> None:
    parts = [numbers(2 * BLOCK + 9, seed) for seed in range(3)]
    messages = [encode(part, FLOAT32, 1 / 3)[0] for part in parts]
    residual = np.zeros(len(parts[0]), np.float32)
    kept = residual if result_kind == INT8 else None
    own, total, result = reduce(messages, FLOAT32, len(parts[0]), torch.float32, result_kind, kept)
    read, again, _ = reduce([result], result_kind, len(parts[0]))
    assert torch.equal(own, read)
    assert total == again
    exact = sum((part.double() / 3 for part in parts), torch.zeros(len(parts[0])).double())
    if result_kind == INT8:
        assert torch.allclose(own.double() + torch.from_numpy(residual), exact, atol=1e-5)
    else:
        slack = 1e-6 * sum((part.abs() for part in parts), torch.zeros(len(parts[0])))
        assert bool(((own - exact).abs() <= bound(result_kind, exact) + slack).all())


LENGTHS = (3, 0, 1, BLOCK, 2 * BLOCK + 1, 500, 1)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_squares_by_parameter(dtype: torch.dtype) -> None:
    bucket = numbers(sum(LENGTHS)).to(dtype)
    kind = next(kind for kind, each in DTYPES.items() if each == dtype)
    measured, after = Sums.of(*LENGTHS), Sums.of(*LENGTHS)
    total = 0.0
    for start, stop in ((0, 2), (2, BLOCK + 700), (BLOCK + 700, len(bucket))):  # as pieces of a bucket come
        total += encode(bucket[start:stop], kind, 0.5, measure=measured, position=start)[1]
    expected = [float(part.double().square().sum()) for part in bucket.split(LENGTHS)]
    assert measured.sums == pytest.approx(expected, rel=1e-6)
    assert total == pytest.approx(sum(expected), rel=1e-6)
    out, _, _ = reduce([encode(bucket, kind, 0.5)[0]], kind, len(bucket), dtype, measure=after)
    assert after.sums == pytest.approx([float(part.double().square().sum()) for part in out.split(LENGTHS)], rel=1e-6)


def test_squares_beyond_float32() -> None:
    large, small = torch.full((1000,), 1e25), torch.full((1000,), 1e-25)
    assert encode(large, FLOAT32)[1] == pytest.approx(1e53, rel=1e-6)
    assert encode(small, FLOAT32)[1] == pytest.approx(1e-47, rel=1e-6)


def test_a_message_of_another_bucket_is_refused() -> None:
    written, _ = encode(torch.ones(5), FLOAT32)
    out, total, _ = reduce([written], FLOAT32, 5, bucket_length=12346)
    assert total == -1
    assert out.tolist() == [-7.0] * 5


def test_a_result_that_is_not_measured() -> None:
    values = torch.ones(10)
    written = np.zeros(message_bytes(FLOAT32, 10), np.uint8)
    arguments = (FLOAT32, values.data_ptr(), 10, 1.0, FLOAT32, written.ctypes.data, 10, 0, WORKSPACE.ctypes.data)
    assert message.encode(*arguments, 0, NOT_MEASURED, 0, 0) == 0
    assert np.array_equal(written[HEADER_BYTES:].view(np.float32), np.ones(10))


def test_no_wire_format_is_wider_than_the_gradient() -> None:
    assert wire_kind("gradient", BFLOAT16) == BFLOAT16
    assert [wire_kind(wire, FLOAT32) for wire in ("gradient", "bfloat16", "float16", "int8")] == [
        FLOAT32,
        BFLOAT16,
        SCALED_FLOAT16,
        INT8,
    ]
    assert wire_kind("float16", BFLOAT16) == BFLOAT16
    assert wire_kind("int8", FLOAT16) == INT8
    assert {wire_kind(wire, FLOAT64) for wire in ("gradient", "bfloat16", "float16", "int8")} == {FLOAT64}
    assert message_bytes(INT8, 1025) == HEADER_BYTES + 2 * 4 + 1025
