"""One chunk of an all-reduce: copying it in, adding it up, gathering it, and the steps that ranks take by turns.

Functions that go over a gradient add each parameter's sum of squares to that parameter's place.
"""

from __future__ import annotations

from ddp.transport import codec
from ddp.transport.blocks import (
    BLOCK,
    add_block,
    add_kept,
    copy_block,
    first_two_terms,
    measure_block,
    next_term,
    next_two_terms,
    rescale,
    set_negative_zero,
    write_block,
    write_slice,
)
from ddp.transport.jit import (
    carray,
    chosen_by_type,
    float32_pointer,
    float64_pointer,
    inlined,
    int64_pointer,
    types,
)
from ddp.transport.protocol import (
    COLLECTED,
    CONTROL,
    CONTROL_BYTES,
    COPIED,
    DEPTH,
    DONE,
    ENDS,
    GATHERED,
    MEAN_CURSOR,
    MEAN_SUM,
    MEAN_SUMS,
    MISMATCH,
    OFFSET,
    OWN_CURSOR,
    OWN_SUM,
    OWN_SUMS,
    PARAMETERS,
    PUBLISHED,
    RANK,
    REDUCED,
    RESIDUAL,
    RESULT_SEQUENCE,
    SEQUENCE,
    SHARED,
    TAKEN,
    TOTALS,
    WAITING,
    WIRE,
    WORLD_SIZE,
    agree,
    announce,
    await_all,
    chunks_of,
    next_piece,
    own_weight,
    shared_slice,
    slice_of,
    slot_address,
    slot_of,
)

_SUM_BLOCK = 2048  # elements summed at a time over all ranks, so that the sum stays in the first-level cache


# --- one chunk; each returns the sum of squares, having added each parameter's to that parameter's sum ------------


@inlined
def _copy_in(state, bucket, gradient, start, stop, slot, zero):
    """slot = gradient[start:stop]"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[OWN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = next_piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = copy_block(slot[position - start : end - start], gradient[position:end], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[OWN_CURSOR] = cursor
    return total


@inlined
def measure(state, bucket, gradient, start, stop, zero):
    """The squares of gradient[start:stop]"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[OWN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = next_piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = measure_block(gradient[position:end], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[OWN_CURSOR] = cursor
    return total


@inlined
def _add_other(state, bucket, gradient, start, stop, slot, weights, zero):
    """Of two ranks: gradient[start:stop] = the weighted sum of itself and the other's slot."""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    mine, other = weights[state[RANK]], weights[1 - state[RANK]]
    cursor, position, total = state[MEAN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = next_piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = add_block(gradient[position:end], slot[position - start : end - start], mine, other, zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[MEAN_CURSOR] = cursor
    return total


@inlined
def store_mean(state, bucket, gradient, start, stop, values, zero):
    """gradient[start:stop] = values"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[MEAN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = next_piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = write_block(gradient[position:end], values[position - start : end - start], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[MEAN_CURSOR] = cursor
    return total


# A bucket travels as it is, or encoded; which of the two is a matter of the type of `wire`: an array like the
# gradient, or of int8. The two ways are compiled into different kernels.


def _put(state, bucket, gradient, wire, start, stop, sequence, zero):
    """Write gradient[start:stop] into this rank's slot; returns its sum of squares."""


def _sum_slots(state, wire, chunk, length, start, stop, totals, weights):
    """totals = the weighted sum over ranks, in rank order, of [start:stop] of the slots; at most BLOCK elements."""


def _put_plain(state, bucket, gradient, wire, start, stop, sequence, zero):
    slot = slot_of(state, wire, state[RANK], sequence, stop - start)
    return _copy_in(state, bucket, gradient, start, stop, slot, zero)


def _put_encoded(state, bucket, gradient, wire, start, stop, sequence, zero):
    """What encoding leaves out is kept in units of the sum, since a rank's weight may change from step to step."""
    payload, blocks = slot_address(state, state[RANK], sequence), chunks_of(stop - start, codec.BLOCK)
    values, residual, weight = carray(float32_pointer(state[TOTALS]), BLOCK), bucket[RESIDUAL], own_weight(state)
    keeps = residual != 0 and weight > 0
    for position in range(start, stop, codec.BLOCK):
        part = gradient[position : min(stop, position + codec.BLOCK)]
        corrected = values[: len(part)]
        if not keeps:
            write_slice(corrected, part)
            codec.encode_block(state[WIRE], payload, blocks, position - start, corrected, 0)
            continue
        kept = carray(float32_pointer(residual + 4 * position), len(part))
        add_kept(corrected, part, kept, types.float32(1 / weight))
        codec.encode_block(state[WIRE], payload, blocks, position - start, corrected, residual + 4 * start)
        rescale(kept, types.float32(weight))
    return measure(state, bucket, gradient, start, stop, zero)


def _sum_plain_slots(state, wire, chunk, length, start, stop, totals, weights):
    out, ranks = totals[: stop - start], state[WORLD_SIZE]
    first = slot_of(state, wire, 0, chunk, length)[start:stop]
    second = slot_of(state, wire, 1, chunk, length)[start:stop]
    first_two_terms(out, first, second, weights[0], weights[1])
    for rank in range(2, ranks - 1, 2):
        first = slot_of(state, wire, rank, chunk, length)[start:stop]
        second = slot_of(state, wire, rank + 1, chunk, length)[start:stop]
        next_two_terms(out, first, second, weights[rank], weights[rank + 1])
    if ranks % 2 == 1:
        next_term(out, slot_of(state, wire, ranks - 1, chunk, length)[start:stop], weights[ranks - 1])


def _sum_encoded_slots(state, wire, chunk, length, start, stop, totals, weights):
    blocks = chunks_of(length, codec.BLOCK)
    position = start
    while position < stop:
        end = min(stop, (position // codec.BLOCK + 1) * codec.BLOCK)
        part = totals[position - start : end - start]
        set_negative_zero(part)
        for rank in range(state[WORLD_SIZE]):
            payload = slot_address(state, rank, chunk)
            codec.add_block(state[WIRE], payload, blocks, position, weights[rank], part)
        position = end


@chosen_by_type(_put)
def _(state, bucket, gradient, wire, start, stop, sequence, zero):
    return _put_encoded if wire.dtype == types.int8 else _put_plain


@chosen_by_type(_sum_slots)
def _(state, wire, chunk, length, start, stop, totals, weights):
    return _sum_encoded_slots if wire.dtype == types.int8 else _sum_plain_slots


@inlined
def _add_all(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):
    """gradient[start:stop] = the weighted sum of all ranks' slots."""
    total = 0.0
    for position in range(start, stop, _SUM_BLOCK):
        end = min(stop, position + _SUM_BLOCK)
        _sum_slots(state, wire, chunk, stop - start, position - start, end - start, totals, weights)
        total += store_mean(state, bucket, gradient, position, end, totals, zero)
    return total


def add_up(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):
    """gradient[start:stop] = the weighted sum of all ranks' slots; returns its sum of squares."""


def _add_up_plain(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):
    if state[WORLD_SIZE] == 2:
        slot = slot_of(state, wire, 1 - state[RANK], chunk, stop - start)
        return _add_other(state, bucket, gradient, start, stop, slot, weights, zero)
    return _add_all(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero)


def _add_up_encoded(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):
    return _add_all(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero)


@chosen_by_type(add_up)
def _(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):
    return _add_up_encoded if wire.dtype == types.int8 else _add_up_plain


@inlined
def reduce_slice(state, out, wire, chunk, length, weights):
    """out = this rank's slice of the weighted sum of all ranks' slots, which hold `length` elements each."""
    first, last = slice_of(length, state[RANK], state[WORLD_SIZE])
    for position in range(first, last, _SUM_BLOCK):
        end = min(last, position + _SUM_BLOCK)
        _sum_slots(state, wire, chunk, length, position, end, out[position - first : end - first], weights)


@inlined
def _gather(state, bucket, gradient, totals, chunk, start, stop, zero):
    """gradient[start:stop] = the slices that all ranks shared."""
    total = 0.0
    for rank in range(state[WORLD_SIZE]):
        first, last = slice_of(stop - start, rank, state[WORLD_SIZE])
        part = shared_slice(state, totals, rank, chunk, last - first)
        total += store_mean(state, bucket, gradient, start + first, start + last, part, zero)
    return total


# --- the steps of an operation; False: another rank has to come first -------------------------------------------


@inlined
def copy_chunk(state, sums, bucket, gradient, wire, elements, zero):
    """Copy the next chunk in and publish it."""
    sequence = state[SEQUENCE] + state[COPIED]
    if not await_all(state, TAKEN, sequence + 1 - state[DEPTH]):
        return False
    start = state[COPIED] * elements
    stop = min(start + elements, len(gradient))
    sums[OWN_SUM] += _put(state, bucket, gradient, wire, start, stop, sequence, zero)
    announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + PUBLISHED, sequence + 1)
    state[COPIED] += 1
    return True


@inlined
def await_chunk(state, length, item_bytes, weights):
    """DONE once everyone has published the next chunk to reduce."""
    if not await_all(state, PUBLISHED, state[SEQUENCE] + state[REDUCED] + 1):
        return WAITING
    if state[REDUCED] == 0 and not agree(state, length, item_bytes, weights):
        return MISMATCH
    return DONE


@inlined
def take_chunk(state):
    """The chunk is reduced: its slots may be written again."""
    state[REDUCED] += 1
    announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + TAKEN, state[SEQUENCE] + state[REDUCED])


@inlined
def place_is_free(state):
    """Whether everyone has gathered what this rank's next slice will replace."""
    return await_all(state, GATHERED, state[RESULT_SEQUENCE] + state[REDUCED] + 1 - state[DEPTH])


@inlined
def share(state):
    """This rank's next slice is there for all."""
    control = state[CONTROL] + state[RANK] * CONTROL_BYTES
    announce(control + SHARED, state[RESULT_SEQUENCE] + state[REDUCED] + 1)


@inlined
def gather_chunk(state, sums, bucket, gradient, totals, elements, zero):
    """Gather the next chunk from all ranks' slices."""
    result = state[RESULT_SEQUENCE] + state[COLLECTED]
    if not await_all(state, SHARED, result + 1):
        return False
    start = state[COLLECTED] * elements
    stop = min(start + elements, len(gradient))
    sums[MEAN_SUM] += _gather(state, bucket, gradient, totals, result, start, stop, zero)
    state[COLLECTED] += 1
    announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + GATHERED, result + 1)
    return True
