"""Wire formats: how blocks of a gradient are written as fewer bits, and read again.

    kind             bytes an element   what is on the wire
    FLOAT64, FLOAT32,
    BFLOAT16, FLOAT16      8, 4, 2, 2   the plain number
    SCALED_FLOAT16       2 + 4 / 1024   a power of two per block of 1,024, so that small gradients do not underflow
    INT8                 1 + 4 / 1024   round(value / scale), one scale per block; what is lost is kept as residual

A payload is all blocks' scales, where the kind has them, and then the numbers. Infinity and NaN arrive as such; a block of
INT8 with one of them arrives as NaN. The functions are parts of kernels: each works on one block, on arrays or
addresses, and is compiled with the kernel that calls it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ddp.transport.jit import (
    bfloat16_bits,
    bfloat16_value,
    carray,
    float16_bits,
    float16_value,
    float32_pointer,
    inlined,
    int8_pointer,
    intrinsic,
    types,
    uint16_pointer,
)

FLOAT64, FLOAT32, BFLOAT16, FLOAT16, SCALED_FLOAT16, INT8 = range(6)
BLOCK = 1024
ELEMENT_BYTES = {FLOAT64: 8, FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, SCALED_FLOAT16: 2, INT8: 1}
FORMATS = {"gradient": FLOAT32, "bfloat16": BFLOAT16, "float16": SCALED_FLOAT16, "int8": INT8}

_INFINITY_BITS, _ANY_BITS = 0x7F800000, 0x7FFFFFFF
_SMALLEST_BITS = 0x05549DA2  # of 1e-35: below, a scale of 1/127 of it would be no normal number


def wire_kind(wire: str, own: int) -> int:
    """What a gradient of kind `own` travels as under the wire format called `wire`: never wider than it is.

    float64 is always sent as it is: who asks for it does not want 8 bits.
    """
    asked = FORMATS[wire]
    return asked if own != FLOAT64 and ELEMENT_BYTES[asked] < ELEMENT_BYTES[own] else own


def payload_bytes(kind: int, length: int) -> int:
    """What `length` elements take on the wire."""
    blocks = -(-length // BLOCK) if kind in (SCALED_FLOAT16, INT8) else 0
    return 4 * blocks + ELEMENT_BYTES[kind] * length


def _reinterpret(source: Any, target: Any, kind: Any) -> Any:
    @intrinsic
    def reinterpret(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], kind)

        return target(source), generate

    return reinterpret


_bits = _reinterpret(types.float32, types.int32, ir.IntType(32))
_number = _reinterpret(types.int32, types.float32, ir.FloatType())


@intrinsic
def _larger(typingctx: Any, largest: Any, value: Any, ceiling: Any) -> Any:
    """The larger of `largest` and the bits of |value|, if those are no more than `ceiling`; bits order as magnitudes do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        magnitude = builder.and_(builder.bitcast(arguments[1], word), word(_ANY_BITS))
        counts = builder.icmp_signed("<=", magnitude, builder.trunc(arguments[2], word))
        counted = builder.select(counts, magnitude, word(0))
        return builder.select(builder.icmp_signed(">", counted, arguments[0]), counted, arguments[0])

    return types.int32(types.int32, types.float32, types.int64), generate


@inlined
def int8_scale(values):
    """The block's largest magnitude / 127; 0 for a block of (almost) zeros, NaN where one is not finite.

    Cut to 16 bits, so that scale * code is exact, and never beyond the largest magnitude.
    """
    largest = types.int32(0)
    for i in range(len(values)):
        largest = _larger(largest, values[i], _ANY_BITS)
    if largest >= _INFINITY_BITS:
        return _number(types.int32(0x7FC00000))
    if largest < _SMALLEST_BITS:
        return types.float32(0)
    return _number(types.int32(_bits(_number(largest) / types.float32(127)) & types.int32(-256)))


@inlined
def int8_encode(values, codes):
    """codes = round(values / scale), ties to even; returns the scale."""
    scale = int8_scale(values)
    if scale > 0:
        inverse = types.float32(1) / scale
        rounder = types.float32(12582912)  # 1.5 * 2**23: adding it leaves no bits behind the point
        for i in range(len(values)):
            codes[i] = types.int8(types.int32((values[i] * inverse + rounder) - rounder))
    else:
        for i in range(len(values)):
            codes[i] = 0
    return scale


@inlined
def int8_residual(values, codes, scale, residual):
    """residual = values - what arrives of them; 0 where that is not finite, or it would stay so for ever."""
    if scale == scale:
        for i in range(len(values)):
            residual[i] = values[i] - scale * types.float32(codes[i])
    else:
        for i in range(len(values)):
            residual[i] = 0


@inlined
def float16_scale(values):
    """The power of two that brings the block's largest finite magnitude to between 2**14 and 2**15."""
    largest = types.int32(0)
    for i in range(len(values)):
        largest = _larger(largest, values[i], _INFINITY_BITS - 1)
    return _number(types.int32(max(types.int32(1), (largest >> 23) - types.int32(14)) << 23))


@inlined
def float16_encode(values, halves):
    """halves = values / scale as float16; returns the scale."""
    scale = float16_scale(values)
    inverse = types.float32(1) / scale
    for i in range(len(values)):
        halves[i] = float16_bits(values[i] * inverse)
    return scale


@inlined
def widen(kind, address, start, values):
    """values = the plain numbers from element `start` on."""
    if kind == FLOAT32:
        singles = carray(float32_pointer(address + 4 * start), len(values))
        for i in range(len(values)):
            values[i] = singles[i]
        return
    words = carray(uint16_pointer(address + 2 * start), len(values))
    if kind == BFLOAT16:
        for i in range(len(values)):
            values[i] = bfloat16_value(words[i])
    else:
        for i in range(len(values)):
            values[i] = float16_value(words[i])


@inlined
def narrow(kind, address, start, values):
    """Store `values` as plain numbers from element `start` on, and round them to what is stored."""
    if kind == FLOAT32:
        singles = carray(float32_pointer(address + 4 * start), len(values))
        for i in range(len(values)):
            singles[i] = values[i]
        return
    words = carray(uint16_pointer(address + 2 * start), len(values))
    if kind == BFLOAT16:
        for i in range(len(values)):
            words[i] = bfloat16_bits(values[i])
            values[i] = bfloat16_value(words[i])
    else:
        for i in range(len(values)):
            words[i] = float16_bits(values[i])
            values[i] = float16_value(words[i])


@inlined
def encode_block(kind, payload, blocks, start, values, residual):
    """Write a block of a message; `residual` is an address, 0 where nothing is kept."""
    length = len(values)
    if kind <= FLOAT16:
        narrow(kind, payload, start, values)
        return
    scales = carray(float32_pointer(payload), blocks)
    if kind == SCALED_FLOAT16:
        scales[start // BLOCK] = float16_encode(
            values, carray(uint16_pointer(payload + 4 * blocks + 2 * start), length)
        )
        return
    codes = carray(int8_pointer(payload + 4 * blocks + start), length)
    scale = int8_encode(values, codes)
    scales[start // BLOCK] = scale
    if residual != 0:
        int8_residual(values, codes, scale, carray(float32_pointer(residual + 4 * start), length))


@inlined
def add_block(kind, payload, blocks, start, factor, values):
    """values += factor * what a block of a message holds."""
    length = len(values)
    if kind == FLOAT32:
        singles = carray(float32_pointer(payload + 4 * start), length)
        for i in range(length):
            values[i] += factor * singles[i]
        return
    if kind == INT8:
        scale = factor * carray(float32_pointer(payload), blocks)[start // BLOCK]
        codes = carray(int8_pointer(payload + 4 * blocks + start), length)
        for i in range(length):
            values[i] += scale * types.float32(codes[i])
        return
    words = carray(uint16_pointer(payload + (4 * blocks if kind == SCALED_FLOAT16 else 0) + 2 * start), length)
    if kind == BFLOAT16:
        for i in range(length):
            values[i] += factor * bfloat16_value(words[i])
        return
    scale = factor * carray(float32_pointer(payload), blocks)[start // BLOCK] if kind == SCALED_FLOAT16 else factor
    for i in range(length):
        values[i] += scale * float16_value(words[i])


@inlined
def publish_block(kind, payload, blocks, start, values, residual):
    """Write a block of the sum and leave in `values` what arrives of it."""
    if residual != 0:
        kept = carray(float32_pointer(residual + 4 * start), len(values))
        for i in range(len(values)):
            values[i] += kept[i]
    encode_block(kind, payload, blocks, start, values, residual)
    if kind > FLOAT16:
        for i in range(len(values)):
            values[i] = types.float32(-0.0)
        add_block(kind, payload, blocks, start, types.float32(1), values)
