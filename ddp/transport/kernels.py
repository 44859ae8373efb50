"""Numba kernels of the all-reduce: the protocol between ranks; the loops over elements are in `blocks`.

Each rank owns a ring of `depth` chunks in shared memory that stays in cache. For chunk k a rank writes its
gradient into slot k mod depth and *publishes* k + 1; readers wait for that, and mark the slot *taken* once they
need it no more; it is written again only when all have taken it. What a reader makes of a chunk:

- whole: it adds all ranks' slots, each times its rank's weight, in rank order, into its bucket;
- slices (many ranks): it adds only its own slice of the chunk and *shares* the sum in a second ring, from
  which everyone *gathers* the slices. Split in two, these are `reduce_scatter` and `all_gather`.

Additions are elementwise and in rank order, so the result is the same bits on every rank, in every run and for
every split of the gradient into buckets. Sums of squares, one a parameter, ride along.

All counters are monotonic, one cache line a writer. `state` is this rank's private progress, so that a
kernel that waits too long can return, let Python look after deadlines, dead peers and signals, and resume.
"""

from __future__ import annotations

from ddp.transport import codec
from ddp.transport.blocks import (
    BLOCK,
    add_block,
    add_kept,
    add_strips,
    copy_block,
    first_two_terms,
    measure_block,
    next_term,
    scale_block,
    scaled,
    set_negative_zero,
    write_block,
    write_slice,
)
from ddp.transport.jit import (
    atomic_add,
    carray,
    chosen_by_type,
    compiled,
    cpu_pause,
    float32_pointer,
    float64_pointer,
    full_fence,
    futex_wait,
    futex_wake_all,
    inlined,
    int8_pointer,
    int16_pointer,
    int64_pointer,
    load_acquire,
    monotonic_nanoseconds,
    on_demand,
    pointer_like,
    store_release,
    types,
    uint16_pointer,
    yield_core,
)
from ddp.transport.row import ROW_LENGTH

# Layout of one rank's control block in the segment, in bytes. Each counter is followed by the number of
# processes that sleep on it; the line of `published` also holds the lengths and weights of the two newest
# operations, since one rank can be an operation ahead of another.
CONTROL_BYTES = 640
PUBLISHED, TAKEN, SHARED, GATHERED, ROWS_PUBLISHED, DEPARTED = 0, 64, 128, 192, 256, 320
SLEEPERS = 8
OPERATION_LENGTHS, OPERATION_WEIGHTS = 16, 32
ROWS = 384
LEFT, FAILED = 1, 2

# Layout of `state`, int64 numbers private to this rank.
STATE_LENGTH = 32
(
    CONTROL,  # address of rank 0's control block
    RINGS,  # address of rank 0's first slot
    RESULTS,  # address of rank 0's first shared slice
    RESULT_BYTES,  # of one shared slice
    RANK,
    WORLD_SIZE,
    SLICES_FROM,  # elements from which a bucket is reduced by slices
    CHUNK_BYTES,
    DEPTH,
    PAUSES,  # spinning before the core is yielded
    YIELDS,  # yields before the kernel sleeps
    PATIENCE,  # nanoseconds of waiting before a kernel returns WAITING
    OPERATION,  # operations finished
    SEQUENCE,  # chunks published before this operation
    RESULT_SEQUENCE,  # slices shared before this operation
    COPIED,  # chunks of this operation copied in
    REDUCED,  # chunks of this operation reduced, or slices shared
    COLLECTED,  # chunks of this operation gathered
    OWN_CURSOR,  # the parameter that the next element to copy in belongs to
    MEAN_CURSOR,  # and that of the next element of the mean
    WAITING_FOR,  # the rank that did not come
    WAITED,  # nanoseconds waited since the start
    ROW_SEQUENCE,  # rows exchanged
    SCRATCH,  # address of two int64 for system calls
    TOTALS,  # address of BLOCK numbers of up to 8 bytes, in which sums are made
    WEIGHTS,  # address of one such number a rank: the weights of this operation
    WIRE,  # how an encoded bucket travels, a kind of `codec`
) = range(27)
OWN_SUM, MEAN_SUM = 30, 31  # float64 in the same array

# Layout of a bucket's description, int64 numbers: three addresses, a number, where the piece at hand
# begins, and the address of what encoding left over (0: nothing is kept).
ENDS, OWN_SUMS, MEAN_SUMS, PARAMETERS, OFFSET, RESIDUAL = range(6)
BUCKET_LENGTH = 6

DONE, WAITING, MISMATCH = 0, 1, 2
_SLEEP_NANOSECONDS = 50_000_000
_AHEAD = 2  # chunks copied in before the oldest is reduced


# --- waiting ---------------------------------------------------------------------------------------------------


@inlined
def _await(state, rank, counter, target):  # type: ignore[no-untyped-def]
    """Wait until `rank`'s counter reaches `target`: pause, yield, sleep. False: it did not come in time."""
    address = state[CONTROL] + rank * CONTROL_BYTES + counter
    if load_acquire(address) >= target:
        return True
    scratch = state[SCRATCH]
    began = monotonic_nanoseconds(scratch)
    arrived = False
    for _ in range(state[PAUSES]):
        cpu_pause()
        if load_acquire(address) >= target:
            arrived = True
            break
    if not arrived:
        for _ in range(state[YIELDS]):
            yield_core()
            if load_acquire(address) >= target:
                arrived = True
                break
    departed = state[CONTROL] + rank * CONTROL_BYTES + DEPARTED
    while not arrived:
        atomic_add(address + SLEEPERS, 1)
        value = load_acquire(address)
        if value < target:
            futex_wait(address, value, _SLEEP_NANOSECONDS, scratch)
        atomic_add(address + SLEEPERS, -1)
        gone = load_acquire(departed) != 0  # read before the counter: what a rank published, it left behind
        arrived = load_acquire(address) >= target
        if not arrived and (gone or monotonic_nanoseconds(scratch) - began > state[PATIENCE]):
            break
    state[WAITED] += monotonic_nanoseconds(scratch) - began
    if not arrived:
        state[WAITING_FOR] = rank
    return arrived


@inlined
def _announce(address, value):  # type: ignore[no-untyped-def]
    """Advance a counter of this rank and wake whoever sleeps on it."""
    store_release(address, value)
    full_fence()
    if load_acquire(address + SLEEPERS) > 0:
        futex_wake_all(address)


@inlined
def _await_all(state, counter, target):  # type: ignore[no-untyped-def]
    for rank in range(state[WORLD_SIZE]):
        if rank != state[RANK] and not _await(state, rank, counter, target):
            return False
    return True


# --- what belongs to an operation ------------------------------------------------------------------------------


@inlined
def _slot_address(state, rank, chunk):  # type: ignore[no-untyped-def]
    """Where `rank`'s slot for the chunk with this sequence number begins."""
    return state[RINGS] + (rank * state[DEPTH] + chunk % state[DEPTH]) * state[CHUNK_BYTES]


@inlined
def _slot(state, like, rank, chunk, length):  # type: ignore[no-untyped-def]
    """That slot as an array like `like`."""
    return carray(pointer_like(like, _slot_address(state, rank, chunk)), length)


@inlined
def _shared_slice(state, like, rank, chunk, length):  # type: ignore[no-untyped-def]
    """`rank`'s slice of the sum of the chunk with this sequence number, as an array like `like`."""
    ring = state[RESULTS] + rank * state[DEPTH] * state[RESULT_BYTES]
    return carray(pointer_like(like, ring + (chunk % state[DEPTH]) * state[RESULT_BYTES]), length)


@inlined
def _slice(length, rank, world_size):  # type: ignore[no-untyped-def]
    """Start and stop of `rank`'s slice of a chunk of `length` elements; slices begin on cache lines."""
    each = ((length + world_size - 1) // world_size + 15) // 16 * 16
    return min(length, rank * each), min(length, (rank + 1) * each)


@inlined
def _begin(state, sums, length, weight):  # type: ignore[no-untyped-def]
    """Begin an operation: tell the others how long it is here and with what weight."""
    sums[OWN_SUM] = 0.0
    sums[MEAN_SUM] = 0.0
    state[OWN_CURSOR] = 0
    state[MEAN_CURSOR] = 0
    line = state[CONTROL] + state[RANK] * CONTROL_BYTES + 8 * (state[OPERATION] % 2)
    carray(float64_pointer(line + OPERATION_WEIGHTS), 1)[0] = weight
    store_release(line + OPERATION_LENGTHS, length)


@inlined
def _agree(state, length, weights):  # type: ignore[no-untyped-def]
    """Once everyone has begun: whether all brought `length` elements; takes their weights."""
    for rank in range(state[WORLD_SIZE]):
        line = state[CONTROL] + rank * CONTROL_BYTES + 8 * (state[OPERATION] % 2)
        if load_acquire(line + OPERATION_LENGTHS) != length:
            state[WAITING_FOR] = rank
            return False
        weights[rank] = carray(float64_pointer(line + OPERATION_WEIGHTS), 1)[0]
    return True


@inlined
def _end(state, chunks, results):  # type: ignore[no-untyped-def]
    """The operation is over: so many chunks were published, and so many slices shared."""
    state[SEQUENCE] += chunks
    state[RESULT_SEQUENCE] += results
    state[COPIED] = 0
    state[REDUCED] = 0
    state[COLLECTED] = 0
    state[OPERATION] += 1
    return DONE


@inlined
def _zero_sums(bucket):  # type: ignore[no-untyped-def]
    """Nothing summed yet of a bucket's parameters."""
    own = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    mean = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    for i in range(bucket[PARAMETERS]):
        own[i] = 0.0
        mean[i] = 0.0


@inlined
def _chunks(length, elements):  # type: ignore[no-untyped-def]
    """An empty bucket has one chunk, too: the ranks must meet."""
    return max(1, (length + elements - 1) // elements)


@inlined
def _piece(ends, cursor, offset, position, stop):  # type: ignore[no-untyped-def]
    """The parameter of the element at `position`, searched from `cursor` on, and where its piece ends."""
    while cursor < len(ends) - 1 and ends[cursor] <= offset + position:
        cursor += 1
    return cursor, min(stop, position + BLOCK, ends[cursor] - offset)


# --- one chunk; each returns the sum of squares, having added each parameter's to that parameter's sum ------------


@inlined
def _copy_in(state, bucket, gradient, start, stop, slot, zero):  # type: ignore[no-untyped-def]
    """slot = gradient[start:stop]"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[OWN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = _piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = copy_block(slot[position - start : end - start], gradient[position:end], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[OWN_CURSOR] = cursor
    return total


@inlined
def _measure(state, bucket, gradient, start, stop, zero):  # type: ignore[no-untyped-def]
    """The squares of gradient[start:stop]"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[OWN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = _piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = measure_block(gradient[position:end], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[OWN_CURSOR] = cursor
    return total


@inlined
def _add_other(state, bucket, gradient, start, stop, slot, weights, zero):  # type: ignore[no-untyped-def]
    """Of two ranks: gradient[start:stop] = the weighted sum of itself and the other's slot."""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    mine, other = weights[state[RANK]], weights[1 - state[RANK]]
    cursor, position, total = state[MEAN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = _piece(ends, cursor, bucket[OFFSET], position, stop)
        if state[27] | state[28]:
            squares = add_strips(gradient[position:end], slot[position - start : end - start], mine, other, zero, state[27], state[28])
        else:
            squares = add_block(gradient[position:end], slot[position - start : end - start], mine, other, zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[MEAN_CURSOR] = cursor
    return total


@inlined
def _store(state, bucket, gradient, start, stop, values, zero):  # type: ignore[no-untyped-def]
    """gradient[start:stop] = values"""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    sums = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    cursor, position, total = state[MEAN_CURSOR], start, 0.0
    while position < stop:
        cursor, end = _piece(ends, cursor, bucket[OFFSET], position, stop)
        squares = write_block(gradient[position:end], values[position - start : end - start], zero)
        sums[cursor] += squares
        total += squares
        position = end
    state[MEAN_CURSOR] = cursor
    return total


# A bucket travels as it is, or encoded; which of the two is a matter of the type of `wire`: an array like the
# gradient, or of int8. The two ways are compiled into different kernels.


def _put(state, bucket, gradient, wire, start, stop, sequence, zero):  # type: ignore[no-untyped-def]
    """Write gradient[start:stop] into this rank's slot; returns its sum of squares."""


def _sum_slots(state, wire, chunk, length, start, stop, totals, weights):  # type: ignore[no-untyped-def]
    """totals = the weighted sum over ranks, in rank order, of [start:stop] of the slots; at most BLOCK elements."""


def _put_plain(state, bucket, gradient, wire, start, stop, sequence, zero):  # type: ignore[no-untyped-def]
    slot = _slot(state, wire, state[RANK], sequence, stop - start)
    return _copy_in(state, bucket, gradient, start, stop, slot, zero)


def _put_encoded(state, bucket, gradient, wire, start, stop, sequence, zero):  # type: ignore[no-untyped-def]
    payload, blocks = _slot_address(state, state[RANK], sequence), _chunks(stop - start, codec.BLOCK)
    values = carray(float32_pointer(state[TOTALS]), BLOCK)
    residual = bucket[RESIDUAL]
    for position in range(start, stop, codec.BLOCK):
        part = gradient[position : min(stop, position + codec.BLOCK)]
        kept = residual + 4 * start if residual != 0 else residual
        corrected = values[: len(part)]
        if residual != 0:
            add_kept(corrected, part, carray(float32_pointer(residual + 4 * position), len(part)))
        else:
            write_slice(corrected, part)
        codec.encode_block(state[WIRE], payload, blocks, position - start, corrected, kept)
    return _measure(state, bucket, gradient, start, stop, zero)


def _sum_plain_slots(state, wire, chunk, length, start, stop, totals, weights):  # type: ignore[no-untyped-def]
    out = totals[: stop - start]
    first = _slot(state, wire, 0, chunk, length)[start:stop]
    second = _slot(state, wire, 1, chunk, length)[start:stop]
    first_two_terms(out, first, second, weights[0], weights[1])
    for rank in range(2, state[WORLD_SIZE]):
        next_term(out, _slot(state, wire, rank, chunk, length)[start:stop], weights[rank])


def _sum_encoded_slots(state, wire, chunk, length, start, stop, totals, weights):  # type: ignore[no-untyped-def]
    blocks = _chunks(length, codec.BLOCK)
    position = start
    while position < stop:
        end = min(stop, (position // codec.BLOCK + 1) * codec.BLOCK)
        part = totals[position - start : end - start]
        set_negative_zero(part)
        for rank in range(state[WORLD_SIZE]):
            payload = _slot_address(state, rank, chunk)
            codec.add_block(state[WIRE], payload, blocks, position, weights[rank], part)
        position = end


@chosen_by_type(_put)
def _(state, bucket, gradient, wire, start, stop, sequence, zero):  # type: ignore[no-untyped-def]
    return _put_encoded if wire.dtype == types.int8 else _put_plain


@chosen_by_type(_sum_slots)
def _(state, wire, chunk, length, start, stop, totals, weights):  # type: ignore[no-untyped-def]
    return _sum_encoded_slots if wire.dtype == types.int8 else _sum_plain_slots


@inlined
def _reduce_whole(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero):  # type: ignore[no-untyped-def]
    """gradient[start:stop] = the weighted sum of all ranks' slots."""
    total = 0.0
    for position in range(start, stop, BLOCK):
        end = min(stop, position + BLOCK)
        _sum_slots(state, wire, chunk, stop - start, position - start, end - start, totals, weights)
        total += _store(state, bucket, gradient, position, end, totals, zero)
    return total


@inlined
def _reduce_slice(state, out, wire, chunk, length, totals, weights):  # type: ignore[no-untyped-def]
    """out = this rank's slice of the weighted sum of all ranks' slots, which hold `length` elements each."""
    first, last = _slice(length, state[RANK], state[WORLD_SIZE])
    for position in range(first, last, BLOCK):
        end = min(last, position + BLOCK)
        _sum_slots(state, wire, chunk, length, position, end, totals, weights)
        write_slice(out[position - first : end - first], totals)


@inlined
def _gather(state, bucket, gradient, totals, chunk, start, stop, zero):  # type: ignore[no-untyped-def]
    """gradient[start:stop] = the slices that all ranks shared."""
    total = 0.0
    for rank in range(state[WORLD_SIZE]):
        first, last = _slice(stop - start, rank, state[WORLD_SIZE])
        part = _shared_slice(state, totals, rank, chunk, last - first)
        total += _store(state, bucket, gradient, start + first, start + last, part, zero)
    return total


# --- the steps of an operation; False: another rank has to come first -------------------------------------------


@inlined
def _copy_chunk(state, sums, bucket, gradient, wire, elements, zero):  # type: ignore[no-untyped-def]
    """Copy the next chunk in and publish it."""
    sequence = state[SEQUENCE] + state[COPIED]
    if not _await_all(state, TAKEN, sequence + 1 - state[DEPTH]):
        return False
    start = state[COPIED] * elements
    stop = min(start + elements, len(gradient))
    sums[OWN_SUM] += _put(state, bucket, gradient, wire, start, stop, sequence, zero)
    _announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + PUBLISHED, sequence + 1)
    state[COPIED] += 1
    return True


@inlined
def _await_chunk(state, length, weights):  # type: ignore[no-untyped-def]
    """DONE once everyone has published the next chunk to reduce."""
    if not _await_all(state, PUBLISHED, state[SEQUENCE] + state[REDUCED] + 1):
        return WAITING
    if state[REDUCED] == 0 and not _agree(state, length, weights):
        return MISMATCH
    return DONE


@inlined
def _take_chunk(state):  # type: ignore[no-untyped-def]
    """The chunk is reduced: its slots may be written again."""
    state[REDUCED] += 1
    _announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + TAKEN, state[SEQUENCE] + state[REDUCED])


@inlined
def _place_is_free(state):  # type: ignore[no-untyped-def]
    """Whether everyone has gathered what this rank's next slice will replace."""
    return _await_all(state, GATHERED, state[RESULT_SEQUENCE] + state[REDUCED] + 1 - state[DEPTH])


@inlined
def _share(state):  # type: ignore[no-untyped-def]
    """This rank's next slice is there for all."""
    control = state[CONTROL] + state[RANK] * CONTROL_BYTES
    _announce(control + SHARED, state[RESULT_SEQUENCE] + state[REDUCED] + 1)


@inlined
def _gather_chunk(state, sums, bucket, gradient, totals, elements, zero):  # type: ignore[no-untyped-def]
    """Gather the next chunk from all ranks' slices."""
    result = state[RESULT_SEQUENCE] + state[COLLECTED]
    if not _await_all(state, SHARED, result + 1):
        return False
    start = state[COLLECTED] * elements
    stop = min(start + elements, len(gradient))
    sums[MEAN_SUM] += _gather(state, bucket, gradient, totals, result, start, stop, zero)
    state[COLLECTED] += 1
    _announce(state[CONTROL] + state[RANK] * CONTROL_BYTES + GATHERED, result + 1)
    return True


# --- whole operations; each resumes where an earlier call returned WAITING --------------------------------------


@inlined
def _by_whole_chunks(state, sums, bucket, gradient, wire, totals, weights, exact, zero):  # type: ignore[no-untyped-def]
    elements = state[CHUNK_BYTES] // gradient.itemsize
    chunks = _chunks(len(gradient), elements)
    while state[REDUCED] < chunks:
        if state[COPIED] < min(chunks, state[REDUCED] + state[29]):
            if not _copy_chunk(state, sums, bucket, gradient, wire, elements, zero):
                return WAITING
            continue
        status = _await_chunk(state, len(gradient), weights)
        if status != DONE:
            return status
        chunk, start = state[SEQUENCE] + state[REDUCED], state[REDUCED] * elements
        stop = min(start + elements, len(gradient))
        if exact and state[WORLD_SIZE] == 2:
            slot = _slot(state, gradient, 1 - state[RANK], chunk, stop - start)
            sums[MEAN_SUM] += _add_other(state, bucket, gradient, start, stop, slot, weights, zero)
        else:
            sums[MEAN_SUM] += _reduce_whole(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero)
        _take_chunk(state)
    return _end(state, chunks, 0)


@inlined
def _by_slices(state, sums, bucket, gradient, wire, totals, weights, zero):  # type: ignore[no-untyped-def]
    elements = state[CHUNK_BYTES] // gradient.itemsize
    chunks = _chunks(len(gradient), elements)
    while state[COLLECTED] < chunks:
        if state[COPIED] < min(chunks, state[COLLECTED] + 3):
            if not _copy_chunk(state, sums, bucket, gradient, wire, elements, zero):
                return WAITING
        elif state[REDUCED] < min(chunks, state[COLLECTED] + 2):
            status = _await_chunk(state, len(gradient), weights)
            if status != DONE:
                return status
            if not _place_is_free(state):
                return WAITING
            length = min(elements, len(gradient) - state[REDUCED] * elements)
            out = _shared_slice(state, totals, state[RANK], state[RESULT_SEQUENCE] + state[REDUCED], elements)
            _reduce_slice(state, out, wire, state[SEQUENCE] + state[REDUCED], length, totals, weights)
            _share(state)
            _take_chunk(state)
        elif not _gather_chunk(state, sums, bucket, gradient, totals, elements, zero):
            return WAITING
    return _end(state, chunks, chunks)


@inlined
def _alone(state, sums, bucket, gradient, weight, zero):  # type: ignore[no-untyped-def]
    """One rank needs no ring: gradient *= weight."""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    mean = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    sums[OWN_SUM] = _measure(state, bucket, gradient, 0, len(gradient), zero)
    cursor, position = 0, 0
    while position < len(gradient):
        cursor, end = _piece(ends, cursor, 0, position, len(gradient))
        squares = scale_block(gradient[position:end], weight, zero)
        mean[cursor] += squares
        sums[MEAN_SUM] += squares
        position = end
    state[OPERATION] += 1
    return DONE


@inlined
def _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, exact, zero):  # type: ignore[no-untyped-def]
    """gradient = the weighted sum over ranks."""
    if state[COPIED] == 0:
        _begin(state, sums, len(gradient), weight)
        _zero_sums(bucket)
    if state[WORLD_SIZE] == 1:
        weights[0] = weight
        return _alone(state, sums, bucket, gradient, weights[0], zero)
    if len(gradient) < state[SLICES_FROM]:
        return _by_whole_chunks(state, sums, bucket, gradient, wire, totals, weights, exact, zero)
    return _by_slices(state, sums, bucket, gradient, wire, totals, weights, zero)


@inlined
def _reduce_scatter(state, sums, bucket, gradient, out, weight, totals, weights, zero):  # type: ignore[no-untyped-def]
    """out = this rank's slices of all chunks of the weighted sum, one after the other; gradient stays as it is."""
    elements = state[CHUNK_BYTES] // gradient.itemsize
    chunks = _chunks(len(gradient), elements)
    first, last = _slice(elements, state[RANK], state[WORLD_SIZE])
    if state[COPIED] == 0:
        _begin(state, sums, len(gradient), weight)
    if state[WORLD_SIZE] == 1:
        weights[0] = weight
        sums[OWN_SUM] = _measure(state, bucket, gradient, 0, len(gradient), zero)
        scaled(out, gradient, weights[0])
        return _end(state, 0, 0)
    while state[REDUCED] < chunks:
        if state[COPIED] < min(chunks, state[REDUCED] + _AHEAD):
            if not _copy_chunk(state, sums, bucket, gradient, gradient, elements, zero):
                return WAITING
            continue
        status = _await_chunk(state, len(gradient), weights)
        if status != DONE:
            return status
        length = min(elements, len(gradient) - state[REDUCED] * elements)
        part = out[state[REDUCED] * (last - first) :]
        _reduce_slice(state, part, gradient, state[SEQUENCE] + state[REDUCED], length, totals, weights)
        _take_chunk(state)
    return _end(state, chunks, 0)


@inlined
def _all_gather(state, sums, bucket, own, gradient, totals, zero):  # type: ignore[no-untyped-def]
    """gradient = all ranks' slices of all chunks; `own` holds this rank's, as `_reduce_scatter` gave them."""
    elements = state[CHUNK_BYTES] // gradient.itemsize
    chunks = _chunks(len(gradient), elements)
    first, last = _slice(elements, state[RANK], state[WORLD_SIZE])
    if state[REDUCED] == 0:
        _begin(state, sums, len(gradient), 0.0)
    if state[WORLD_SIZE] == 1:
        sums[MEAN_SUM] = _store(state, bucket, gradient, 0, len(gradient), own, zero)
        return _end(state, 0, 0)
    while state[COLLECTED] < chunks:
        if state[REDUCED] < min(chunks, state[COLLECTED] + _AHEAD):
            if not _place_is_free(state):
                return WAITING
            result, begin = state[RESULT_SEQUENCE] + state[REDUCED], state[REDUCED] * (last - first)
            part = own[begin : begin + last - first]
            write_slice(_shared_slice(state, totals, state[RANK], result, len(part)), part)
            _share(state)
            state[REDUCED] += 1
        elif not _gather_chunk(state, sums, bucket, gradient, totals, elements, zero):
            return WAITING
    return _end(state, 0, chunks)


@inlined
def slices_length(length, elements, rank, world_size):  # type: ignore[no-untyped-def]
    """Elements of all of `rank`'s slices of `length` elements in chunks of `elements`."""
    full = length // elements
    first, last = _slice(elements, rank, world_size)
    begin, end = _slice(length - full * elements, rank, world_size)
    return full * (last - first) + end - begin


# --- what Python calls: (state, gradient, its length, weight, bucket) and for the halves a slice as well -----------
#
# All return DONE, WAITING (call again) or MISMATCH. One function a dtype, written out: Numba would not find a
# closure in its cache again.

_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64, types.int64)
_HALF_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64, types.int64, types.int64)


@compiled(_SIGNATURE)
def all_reduce_float32(state_address, data_address, length, weight, bucket_address):  # type: ignore[no-untyped-def]
    """Average float32 in place."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float32_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    wire = gradient
    return _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, True, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_float64(state_address, data_address, length, weight, bucket_address):  # type: ignore[no-untyped-def]
    """As `all_reduce_float32`, for float64."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float64_pointer(data_address), length)
    totals, weights = (
        carray(float64_pointer(state[TOTALS]), BLOCK),
        carray(float64_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    wire = gradient
    return _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, True, types.float64(0))


@on_demand(_SIGNATURE)
def all_reduce_bfloat16(state_address, data_address, length, weight, bucket_address):  # type: ignore[no-untyped-def]
    """As `all_reduce_float32`, for bfloat16, summed in float32."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(uint16_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    wire = gradient
    return _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, True, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_float16(state_address, data_address, length, weight, bucket_address):  # type: ignore[no-untyped-def]
    """As `all_reduce_float32`, for float16, summed in float32."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(int16_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    wire = gradient
    return _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, True, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_encoded_float32(state_address, data_address, length, weight, bucket_address):  # type: ignore[no-untyped-def]
    """As `all_reduce_float32`; between the ranks it travels as `state[WIRE]` says."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float32_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    wire = carray(int8_pointer(state_address), 1)
    return _all_reduce(state, sums, bucket, gradient, wire, weight, totals, weights, False, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float32(state_address, data_address, length, weight, bucket_address, out_address):  # type: ignore[no-untyped-def]
    """This rank's slices of the weighted sum of float32 gradients, as float32."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float32_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    out = carray(
        float32_pointer(out_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _reduce_scatter(state, sums, bucket, gradient, out, weight, totals, weights, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float32(state_address, data_address, length, weight, bucket_address, own_address):  # type: ignore[no-untyped-def]
    """A float32 bucket from all ranks' slices."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float32_pointer(data_address), length)
    totals = carray(float32_pointer(state[TOTALS]), BLOCK)
    own = carray(
        float32_pointer(own_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _all_gather(state, sums, bucket, own, gradient, totals, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float64(state_address, data_address, length, weight, bucket_address, out_address):  # type: ignore[no-untyped-def]
    """This rank's slices of the weighted sum of float64 gradients, as float64."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float64_pointer(data_address), length)
    totals, weights = (
        carray(float64_pointer(state[TOTALS]), BLOCK),
        carray(float64_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    out = carray(
        float64_pointer(out_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _reduce_scatter(state, sums, bucket, gradient, out, weight, totals, weights, types.float64(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float64(state_address, data_address, length, weight, bucket_address, own_address):  # type: ignore[no-untyped-def]
    """A float64 bucket from all ranks' slices."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(float64_pointer(data_address), length)
    totals = carray(float64_pointer(state[TOTALS]), BLOCK)
    own = carray(
        float64_pointer(own_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _all_gather(state, sums, bucket, own, gradient, totals, types.float64(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_bfloat16(state_address, data_address, length, weight, bucket_address, out_address):  # type: ignore[no-untyped-def]
    """This rank's slices of the weighted sum of bfloat16 gradients, as float32."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(uint16_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    out = carray(
        float32_pointer(out_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _reduce_scatter(state, sums, bucket, gradient, out, weight, totals, weights, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_bfloat16(state_address, data_address, length, weight, bucket_address, own_address):  # type: ignore[no-untyped-def]
    """A bfloat16 bucket from all ranks' slices."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(uint16_pointer(data_address), length)
    totals = carray(float32_pointer(state[TOTALS]), BLOCK)
    own = carray(
        float32_pointer(own_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _all_gather(state, sums, bucket, own, gradient, totals, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float16(state_address, data_address, length, weight, bucket_address, out_address):  # type: ignore[no-untyped-def]
    """This rank's slices of the weighted sum of float16 gradients, as float32."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(int16_pointer(data_address), length)
    totals, weights = (
        carray(float32_pointer(state[TOTALS]), BLOCK),
        carray(float32_pointer(state[WEIGHTS]), state[WORLD_SIZE]),
    )
    out = carray(
        float32_pointer(out_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _reduce_scatter(state, sums, bucket, gradient, out, weight, totals, weights, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float16(state_address, data_address, length, weight, bucket_address, own_address):  # type: ignore[no-untyped-def]
    """A float16 bucket from all ranks' slices."""
    state, bucket = (
        carray(int64_pointer(state_address), STATE_LENGTH),
        carray(int64_pointer(bucket_address), BUCKET_LENGTH),
    )
    sums, gradient = carray(float64_pointer(state_address), STATE_LENGTH), carray(int16_pointer(data_address), length)
    totals = carray(float32_pointer(state[TOTALS]), BLOCK)
    own = carray(
        float32_pointer(own_address),
        slices_length(length, state[CHUNK_BYTES] // gradient.itemsize, state[RANK], state[WORLD_SIZE]),
    )
    return _all_gather(state, sums, bucket, own, gradient, totals, types.float32(0))


@compiled(types.int64(types.int64, types.int64, types.int64))
def exchange_rows(state_address, row_address, rows_address):  # type: ignore[no-untyped-def]
    """Publish this rank's row and gather everyone's; DONE or WAITING (call again with the same row).

    A rank can be one row ahead of the slowest, never two: two places a rank suffice.
    """
    state = carray(int64_pointer(state_address), STATE_LENGTH)
    place = ROWS + (state[ROW_SEQUENCE] % 2) * 8 * ROW_LENGTH
    control = state[CONTROL] + state[RANK] * CONTROL_BYTES
    own = carray(float64_pointer(row_address), ROW_LENGTH)
    slot = carray(float64_pointer(control + place), ROW_LENGTH)
    for i in range(ROW_LENGTH):
        slot[i] = own[i]
    _announce(control + ROWS_PUBLISHED, state[ROW_SEQUENCE] + 1)
    if not _await_all(state, ROWS_PUBLISHED, state[ROW_SEQUENCE] + 1):
        return WAITING
    rows = carray(float64_pointer(rows_address), state[WORLD_SIZE] * ROW_LENGTH)
    for rank in range(state[WORLD_SIZE]):
        slot = carray(float64_pointer(state[CONTROL] + rank * CONTROL_BYTES + place), ROW_LENGTH)
        for i in range(ROW_LENGTH):
            rows[rank * ROW_LENGTH + i] = slot[i]
    state[ROW_SEQUENCE] += 1
    return DONE


@compiled(types.int64(types.int64))
def load(address):  # type: ignore[no-untyped-def]
    """The int64 at `address`, acquired."""
    return load_acquire(address)


@compiled(types.void(types.int64, types.int64))
def store(address, value):  # type: ignore[no-untyped-def]
    """Release `value` to `address`."""
    store_release(address, value)
