"""Messages of a gradient exchange: written from a stretch of a bucket, added up in order, measured on the way.

A message is a header (the factor that its numbers still have to be multiplied with, and the length of the bucket they
belong to) and a payload in a wire format of `codec`. Additions are in float32 (float64 for float64), in the
order given, block by block within the first-level cache. Both kernels work on addresses and need no GIL.
"""

from __future__ import annotations

from ddp.transport import codec
from ddp.transport.codec import BLOCK, FLOAT64, add_block, encode_block, narrow, publish_block, widen
from ddp.transport.jit import (
    add_square,
    carray,
    compiled,
    float32_pointer,
    float64_pointer,
    inlined,
    int64_pointer,
    types,
)

HEADER_BYTES = 16
WORKSPACE_BYTES = 4 * BLOCK
NO_RESULT = -1
WHOLE_ONLY, NOT_MEASURED = 0, -1  # what `parameters` may be beside their number
NO_SQUARES = (0, NOT_MEASURED, 0, 0)  # ends, parameters, position, sums
ANOTHER_BUCKET = -1.0
_TINY, _HUGE = 1e-30, 1e37  # outside, a sum of float32 squares may have under- or overflowed


def message_bytes(kind: int, length: int) -> int:
    """The size of the message that holds `length` elements."""
    return HEADER_BYTES + codec.payload_bytes(kind, length)


@inlined
def _squares(values, zero):
    """The sum of squares, summed anew in float64 where the values' own precision over- or underflowed."""
    partial = zero
    for i in range(len(values)):
        partial = add_square(partial, values[i])
    total = types.float64(partial)
    if not (total < _HUGE) or total < _TINY:
        total = 0.0
        for i in range(len(values)):
            total = add_square(total, types.float64(values[i]))
    return total


@inlined
def _measure(values, zero, position, ends, sums, cursor):
    """Add the squares of `values`, which stand at `position` of the bucket, to the sums of their parameters.

    Returns their sum, and the parameter to begin with next time.
    """
    if len(ends) == 0:
        return _squares(values, zero), cursor
    total, start = 0.0, 0
    while start < len(values):
        while ends[cursor] <= position + start:
            cursor += 1
        stop = min(len(values), ends[cursor] - position)
        squares = _squares(values[start:stop], zero)
        sums[cursor] += squares
        total += squares
        start = stop
    return total, cursor


@inlined
def _first_parameter(ends, position):
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        if ends[middle] <= position:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _write_header(message, factor, bucket_length):
    carray(float64_pointer(message), 1)[0] = factor
    carray(int64_pointer(message + 8), 1)[0] = bucket_length


@inlined
def _encode_float64(numbers, payload, measured, position, ends, sums):
    out = carray(float64_pointer(payload), len(numbers))
    total, cursor = 0.0, _first_parameter(ends, position)
    for start in range(0, len(numbers), BLOCK):
        block, target = numbers[start : start + BLOCK], out[start : start + BLOCK]
        for i in range(len(block)):
            target[i] = block[i]
        if measured:
            squares, cursor = _measure(block, 0.0, position + start, ends, sums, cursor)
            total += squares
    return total


_I, _F = types.int64, types.float64


@compiled(_F(_I, _I, _I, _F, _I, _I, _I, _I, _I, _I, _I, _I, _I))
def encode(
    source, address, length, weight, kind, message, bucket_length, residual, workspace, ends, parameters, position, sums
):
    """Write weight * (`length` numbers of kind `source` at `address`) + residual into `message` as `kind`.

    `bucket_length` is for the header. `residual` (float32, 0 for none) becomes what this message leaves out. With
    `parameters` the squares of the numbers, which stand at `position` of their bucket, are added to `sums` by `ends`;
    the sum of all is returned.
    """
    measured = parameters != NOT_MEASURED
    bounds = carray(int64_pointer(ends), max(0, parameters))
    totals = carray(float64_pointer(sums), max(0, parameters))
    payload = message + HEADER_BYTES
    _write_header(message, weight if source == kind else 1.0, bucket_length)
    if source == FLOAT64:
        numbers = carray(float64_pointer(address), length)
        return _encode_float64(numbers, payload, measured, position, bounds, totals)
    blocks = (length + BLOCK - 1) // BLOCK
    scratch, factor = carray(float32_pointer(workspace), BLOCK), types.float32(weight)
    total, cursor = 0.0, _first_parameter(bounds, position)
    for start in range(0, length, BLOCK):
        values = scratch[: min(BLOCK, length - start)]
        widen(source, address, start, values)
        if measured:
            squares, cursor = _measure(values, types.float32(0), position + start, bounds, totals, cursor)
            total += squares
        if source != kind:
            for i in range(len(values)):
                values[i] *= factor
        if residual != 0:
            kept = carray(float32_pointer(residual + 4 * start), len(values))
            for i in range(len(values)):
                values[i] += kept[i]
        encode_block(kind, payload, blocks, start, values, residual)
    return total


@inlined
def _reduce_float64(messages, out, result, bucket_length, measured, position, ends, sums):
    total, cursor = 0.0, _first_parameter(ends, position)
    for start in range(0, len(out), BLOCK):
        values = out[start : start + BLOCK]
        for member in range(len(messages)):
            terms = carray(float64_pointer(messages[member] + HEADER_BYTES + 8 * start), len(values))
            factor = carray(float64_pointer(messages[member]), 1)[0]
            if member == 0:
                for i in range(len(values)):
                    values[i] = factor * terms[i]
            else:
                for i in range(len(values)):
                    values[i] += factor * terms[i]
        if measured:
            squares, cursor = _measure(values, 0.0, position + start, ends, sums, cursor)
            total += squares
    if result != 0:
        _write_header(result, 1.0, bucket_length)
        copy = carray(float64_pointer(result + HEADER_BYTES), len(out))
        for i in range(len(out)):
            copy[i] = out[i]
    return total


@compiled(_F(_I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I))
def reduce(
    kind, addresses, count, target, out, length, result_kind, result, bucket_length, residual, workspace, ends,
    parameters, position, sums,
):  # fmt: skip
    """Add `count` messages of `kind`, whose addresses stand at `addresses`, in that order, into `out`.

    `out` takes `length` numbers of kind `target`. With a `result_kind` the sum also goes into the message `result` as
    that, `residual` included as in `encode`, and `out` gets what readers of that message get. Squares of what `out` gets
    are summed as in `encode`. Returns ANOTHER_BUCKET, having done nothing, where a message belongs to a bucket of another length.
    """
    messages = carray(int64_pointer(addresses), count)
    for member in range(count):
        if carray(int64_pointer(messages[member] + 8), 1)[0] != bucket_length:
            return ANOTHER_BUCKET
    measured = parameters != NOT_MEASURED
    bounds = carray(int64_pointer(ends), max(0, parameters))
    totals = carray(float64_pointer(sums), max(0, parameters))
    if target == FLOAT64:
        numbers = carray(float64_pointer(out), length)
        return _reduce_float64(messages, numbers, result, bucket_length, measured, position, bounds, totals)
    blocks = (length + BLOCK - 1) // BLOCK
    scratch = carray(float32_pointer(workspace), BLOCK)
    total, cursor = 0.0, _first_parameter(bounds, position)
    if result_kind != NO_RESULT:
        _write_header(result, 1.0, bucket_length)
    for start in range(0, length, BLOCK):
        values = scratch[: min(BLOCK, length - start)]
        for i in range(len(values)):
            values[i] = types.float32(-0.0)  # plus anything is that, zeros of either sign included
        for member in range(count):
            factor = types.float32(carray(float64_pointer(messages[member]), 1)[0])
            add_block(kind, messages[member] + HEADER_BYTES, blocks, start, factor, values)
        if result_kind != NO_RESULT:
            publish_block(result_kind, result + HEADER_BYTES, blocks, start, values, residual)
        narrow(target, out, start, values)
        if measured:
            squares, cursor = _measure(values, types.float32(0), position + start, bounds, totals, cursor)
            total += squares
    return total
