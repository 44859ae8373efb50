"""Numba loops of the all-reduce: copy-in, reduce, sums of squares, waiting.

The algorithm. Each rank owns a ring of `depth` chunks in shared memory that stays in cache. For chunk k of
a bucket a rank writes weight * gradient into its slot k mod depth and *publishes* k + 1; it then waits until
every rank has published chunk k, adds the slots in rank order, writes the sum into the bucket and marks the
chunk *consumed*; a slot is written again only once every rank has consumed what it held. Sums of squares ride along.
The order of additions is fixed and elementwise, so the result is the same bits on every rank, in every
run and for every split of the gradient into buckets.

All counters are monotonic, one cache line a writer. `state` is this rank's private progress, so that a
kernel that waits too long can return, let Python look after deadlines, dead peers and signals, and resume.
"""

from __future__ import annotations

from ddp.transport.jit import (
    add_square,
    atomic_add,
    carray,
    compiled,
    cpu_pause,
    float32_pointer,
    float64_pointer,
    full_fence,
    futex_wait,
    futex_wake_all,
    inlined,
    int64_pointer,
    load_acquire,
    monotonic_nanoseconds,
    pointer_like,
    store_release,
    types,
    yield_core,
)
from ddp.transport.row import ROW_LENGTH

# Layout of one rank's control block in the segment, in bytes. Each counter is followed by the number of
# processes that sleep on it; the lengths of the two newest operations share the line of `published`.
CONTROL_BYTES = 512
PUBLISHED, CONSUMED, ROWS_PUBLISHED, DEPARTED = 0, 64, 128, 192
SLEEPERS = 8
OPERATION_LENGTHS = 16
ROWS = 256
LEFT, FAILED = 1, 2

# Layout of `state`, int64 numbers private to this rank.
STATE_LENGTH = 24
(
    CONTROL,  # address of rank 0's control block
    RINGS,  # address of rank 0's first slot
    RANK,
    WORLD_SIZE,
    CHUNK_BYTES,
    DEPTH,
    PAUSES,  # spinning before the core is yielded
    YIELDS,  # yields before the kernel sleeps
    PATIENCE,  # nanoseconds of waiting before a kernel returns WAITING
    OPERATION,  # operations finished
    SEQUENCE,  # chunks published before this operation
    COPIED,  # chunks of this operation copied in
    REDUCED,  # chunks of this operation reduced
    WAITING_FOR,  # the rank that did not come
    WAITED,  # nanoseconds waited since the start
    ROW_SEQUENCE,  # rows exchanged
    SCRATCH,  # two int64 for system calls
) = range(17)
OWN_SUM, MEAN_SUM = 20, 21  # float64 in the same array

DONE, WAITING, MISMATCH = 0, 1, 2
_BLOCK = 8192  # elements summed in the gradient's own precision before float64 takes over
_TINY = 1e-30  # below, float32 squares may have underflowed
_SLEEP_NANOSECONDS = 50_000_000
_AHEAD = 2  # chunks copied in before the oldest is reduced


# The inner loops run over slices from index 0: an index that might be negative stops vectorisation, and so do
# two names for one buffer. Only the sums of squares may be reordered, never the gradients beside them.


@inlined
def _exact_squares(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(values)):
        total = add_square(total, types.float64(values[i]))
    return total


@inlined
def _settle(partial, values):  # type: ignore[no-untyped-def]
    """The block's sum in float64; summed anew where the gradient's own precision over- or underflowed."""
    total = types.float64(partial)
    if not (total < 1e37) or total < _TINY:
        return _exact_squares(values)
    return total


@inlined
def _copy_block(slot, gradient, weight, zero):  # type: ignore[no-untyped-def]
    partial = zero
    for i in range(len(gradient)):
        value = gradient[i]
        slot[i] = value * weight
        partial = add_square(partial, value)
    return _settle(partial, gradient)


@inlined
def _add_block(out, first, second, zero):  # type: ignore[no-untyped-def]
    partial = zero
    for i in range(len(out)):
        value = first[i] + second[i]
        out[i] = value
        partial = add_square(partial, value)
    return _settle(partial, out)


@inlined
def _accumulate_block(out, term, zero):  # type: ignore[no-untyped-def]
    partial = zero
    for i in range(len(out)):
        value = out[i] + term[i]
        out[i] = value
        partial = add_square(partial, value)
    return _settle(partial, out)


@inlined
def _scale_block(gradient, weight, zero):  # type: ignore[no-untyped-def]
    partial = zero
    for i in range(len(gradient)):
        value = gradient[i] * weight
        gradient[i] = value
        partial = add_square(partial, value)
    return _settle(partial, gradient)


@inlined
def _measure_block(gradient, zero):  # type: ignore[no-untyped-def]
    partial = zero
    for i in range(len(gradient)):
        partial = add_square(partial, gradient[i])
    return _settle(partial, gradient)


@inlined
def _copy_in(slot, gradient, weight, zero):  # type: ignore[no-untyped-def]
    """slot = weight * gradient; returns sum(gradient ** 2)."""
    total = 0.0
    for start in range(0, len(gradient), _BLOCK):
        total += _copy_block(slot[start : start + _BLOCK], gradient[start : start + _BLOCK], weight, zero)
    return total


@inlined
def _sum_slots(state, gradient, chunk, zero):  # type: ignore[no-untyped-def]
    """gradient = sum over ranks, in rank order, of their slots; returns its sum of squares."""
    world_size = state[WORLD_SIZE]
    length = len(gradient)
    total = 0.0
    for start in range(0, length, _BLOCK):
        out = gradient[start : start + _BLOCK]
        first = _slot(state, gradient, 0, chunk, length)[start : start + _BLOCK]
        second = _slot(state, gradient, 1, chunk, length)[start : start + _BLOCK]
        block = _add_block(out, first, second, zero)
        for rank in range(2, world_size):
            term = _slot(state, gradient, rank, chunk, length)[start : start + _BLOCK]
            block = _accumulate_block(out, term, zero)
        total += block
    return total


@inlined
def _scale_in_place(gradient, weight, zero):  # type: ignore[no-untyped-def]
    """One rank needs no ring: gradient *= weight; returns the sums of squares before and after."""
    own = 0.0
    mean = 0.0
    for start in range(0, len(gradient), _BLOCK):
        part = gradient[start : start + _BLOCK]
        block = _measure_block(part, zero)
        own += block
        mean += block if weight == 1 else _scale_block(part, weight, zero)
    return own, mean


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


@inlined
def _slot(state, gradient, rank, chunk, length):  # type: ignore[no-untyped-def]
    """`rank`'s slot for the chunk with this sequence number, as an array like `gradient`."""
    ring = state[RINGS] + rank * state[DEPTH] * state[CHUNK_BYTES]
    return carray(pointer_like(gradient, ring + (chunk % state[DEPTH]) * state[CHUNK_BYTES]), length)


@inlined
def _same_length(state, length):  # type: ignore[no-untyped-def]
    """Whether every rank brought `length` elements; two operations can be under way, hence the parity."""
    for rank in range(state[WORLD_SIZE]):
        line = state[CONTROL] + rank * CONTROL_BYTES + OPERATION_LENGTHS
        if load_acquire(line + 8 * (state[OPERATION] % 2)) != length:
            state[WAITING_FOR] = rank
            return False
    return True


@inlined
def _all_reduce(state, sums, gradient, weight, zero, chunk_elements):  # type: ignore[no-untyped-def]
    """The weighted sum over ranks, in place; resumes where an earlier call returned WAITING."""
    length = len(gradient)
    if state[WORLD_SIZE] == 1:
        sums[OWN_SUM], sums[MEAN_SUM] = _scale_in_place(gradient, weight, zero)
        state[OPERATION] += 1
        return DONE
    control = state[CONTROL] + state[RANK] * CONTROL_BYTES
    chunks = max(1, (length + chunk_elements - 1) // chunk_elements)
    if state[COPIED] == 0:
        sums[OWN_SUM] = 0.0
        sums[MEAN_SUM] = 0.0
        store_release(control + OPERATION_LENGTHS + 8 * (state[OPERATION] % 2), length)
    while state[REDUCED] < chunks:
        if state[COPIED] < chunks and state[COPIED] < state[REDUCED] + _AHEAD:
            sequence = state[SEQUENCE] + state[COPIED]
            if not _await_all(state, CONSUMED, sequence + 1 - state[DEPTH]):
                return WAITING
            start = state[COPIED] * chunk_elements
            part = gradient[start : min(start + chunk_elements, length)]
            sums[OWN_SUM] += _copy_in(_slot(state, gradient, state[RANK], sequence, len(part)), part, weight, zero)
            _announce(control + PUBLISHED, sequence + 1)
            state[COPIED] += 1
        else:
            sequence = state[SEQUENCE] + state[REDUCED]
            if not _await_all(state, PUBLISHED, sequence + 1):
                return WAITING
            if state[REDUCED] == 0 and not _same_length(state, length):
                return MISMATCH
            start = state[REDUCED] * chunk_elements
            part = gradient[start : min(start + chunk_elements, length)]
            sums[MEAN_SUM] += _sum_slots(state, part, sequence, zero)
            _announce(control + CONSUMED, sequence + 1)
            state[REDUCED] += 1
    state[SEQUENCE] += chunks
    state[COPIED] = 0
    state[REDUCED] = 0
    state[OPERATION] += 1
    return DONE


_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64)


@compiled(_SIGNATURE)
def all_reduce_float32(state_address, data_address, length, weight):  # type: ignore[no-untyped-def]
    """Average `length` float32 at `data_address` in place; DONE, WAITING (call again) or MISMATCH."""
    state = carray(int64_pointer(state_address), STATE_LENGTH)
    sums = carray(float64_pointer(state_address), STATE_LENGTH)
    gradient = carray(float32_pointer(data_address), length)
    return _all_reduce(state, sums, gradient, types.float32(weight), types.float32(0), state[CHUNK_BYTES] // 4)


@compiled(_SIGNATURE)
def all_reduce_float64(state_address, data_address, length, weight):  # type: ignore[no-untyped-def]
    """As `all_reduce_float32`, for float64."""
    state = carray(int64_pointer(state_address), STATE_LENGTH)
    sums = carray(float64_pointer(state_address), STATE_LENGTH)
    gradient = carray(float64_pointer(data_address), length)
    return _all_reduce(state, sums, gradient, weight, 0.0, state[CHUNK_BYTES] // 8)


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
