"""How ranks that share memory take turns: layouts, counters, waiting, and where the chunks of an operation lie.

All counters are monotonic, one cache line a writer. `state` is this rank's private progress, so that a
kernel that waits too long can return, let Python look after deadlines, dead peers and signals, and resume.
"""

from __future__ import annotations

from ddp.transport.blocks import BLOCK
from ddp.transport.jit import (
    atomic_add,
    carray,
    cpu_pause,
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
    yield_core,
)
from ddp.transport.row import ROW_LENGTH

# Layout of one rank's control block in the segment, in bytes. Each counter is followed by the number of
# processes that sleep on it; the line of `published` also holds the lengths and weights of the two newest
# operations, since one rank can be an operation ahead of another.
PUBLISHED, TAKEN, SHARED, GATHERED, ROWS_PUBLISHED, DEPARTED = 0, 64, 128, 192, 256, 320
WAITS_ELSEWHERE = 336  # the rank of another node that this rank waits for, plus 1
SLEEPERS = 8
OPERATION_LENGTHS, OPERATION_WEIGHTS = 16, 32
ROWS = 384
CONTROL_BYTES = ROWS + 2 * 8 * ROW_LENGTH  # whole cache lines: places for two rows, see kernels.exchange_rows
LEFT, FAILED = 1, 2

# Layout of `state`, int64 numbers private to this rank.
STATE_LENGTH = 40
(
    CONTROL,  # address of rank 0's control block
    RINGS,  # address of rank 0's first slot
    RESULTS,  # address of rank 0's first shared slice
    RESULT_BYTES,  # of one shared slice
    RANK,
    WORLD_SIZE,
    SLICES_FROM,  # elements from which a bucket is reduced by slices
    CHUNK_BYTES,  # of a slot
    STREAM_BYTES,  # of a chunk of a large bucket: its slots stay in cache beside the bucket that streams through
    SMALL_BUCKET_BYTES,  # up to which chunks are as large as slots: fewer meetings
    DEPTH,
    AHEAD,  # chunks copied in, or slices shared, before the oldest is reduced or gathered; less than DEPTH
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
) = range(30)
OWN_SUM, MEAN_SUM = 32, 33  # float64 in the same array

# Layout of a bucket's description, int64 numbers: three addresses, a number, where the piece at hand
# begins, and the address of what encoding left over (0: nothing is kept).
ENDS, OWN_SUMS, MEAN_SUMS, PARAMETERS, OFFSET, RESIDUAL = range(6)
BUCKET_LENGTH = 6

DONE, WAITING, MISMATCH = 0, 1, 2
_SLEEP_NANOSECONDS = 50_000_000
_LARGEST_ITEM = 16  # an element has fewer bytes


# --- waiting ---------------------------------------------------------------------------------------------------


@inlined
def _await(state, rank, counter, target):
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
def announce(address, value):
    """Advance a counter of this rank and wake whoever sleeps on it."""
    store_release(address, value)
    full_fence()
    if load_acquire(address + SLEEPERS) > 0:
        futex_wake_all(address)


@inlined
def await_all(state, counter, target):
    for rank in range(state[WORLD_SIZE]):
        if rank != state[RANK] and not _await(state, rank, counter, target):
            return False
    return True


# --- what belongs to an operation ------------------------------------------------------------------------------


@inlined
def private(state_address, bucket_address, zero):
    """What a kernel keeps in this rank's own memory: its state, twice, the bucket, and room for sums and weights."""
    state = carray(int64_pointer(state_address), STATE_LENGTH)
    sums = carray(float64_pointer(state_address), STATE_LENGTH)
    bucket = carray(int64_pointer(bucket_address), BUCKET_LENGTH)
    totals = carray(pointer_like(zero, state[TOTALS]), BLOCK)
    weights = carray(pointer_like(zero, state[WEIGHTS]), state[WORLD_SIZE])
    return state, sums, bucket, totals, weights


@inlined
def slot_address(state, rank, chunk):
    """Where `rank`'s slot for the chunk with this sequence number begins."""
    return state[RINGS] + (rank * state[DEPTH] + chunk % state[DEPTH]) * state[CHUNK_BYTES]


@inlined
def slot_of(state, like, rank, chunk, length):
    """That slot as an array like `like`."""
    return carray(pointer_like(like, slot_address(state, rank, chunk)), length)


@inlined
def shared_slice(state, like, rank, chunk, length):
    """`rank`'s slice of the sum of the chunk with this sequence number, as an array like `like`."""
    ring = state[RESULTS] + rank * state[DEPTH] * state[RESULT_BYTES]
    return carray(pointer_like(like, ring + (chunk % state[DEPTH]) * state[RESULT_BYTES]), length)


@inlined
def slice_of(length, rank, world_size):
    """Start and stop of `rank`'s slice of a chunk of `length` elements; slices begin on cache lines."""
    each = ((length + world_size - 1) // world_size + 15) // 16 * 16
    return min(length, rank * each), min(length, (rank + 1) * each)


@inlined
def begin(state, sums, length, item_bytes, weight):
    """Begin an operation: tell the others how many elements of which size it has here, and the weight."""
    sums[OWN_SUM] = 0.0
    sums[MEAN_SUM] = 0.0
    state[OWN_CURSOR] = 0
    state[MEAN_CURSOR] = 0
    line = state[CONTROL] + state[RANK] * CONTROL_BYTES + 8 * (state[OPERATION] % 2)
    carray(float64_pointer(line + OPERATION_WEIGHTS), 1)[0] = weight
    store_release(line + OPERATION_LENGTHS, length * _LARGEST_ITEM + item_bytes)


@inlined
def own_weight(state):
    """This rank's weight in the operation under way."""
    line = state[CONTROL] + state[RANK] * CONTROL_BYTES + 8 * (state[OPERATION] % 2)
    return carray(float64_pointer(line + OPERATION_WEIGHTS), 1)[0]


@inlined
def agree(state, length, item_bytes, weights):
    """Once everyone has begun: whether all brought `length` elements of that size; takes their weights."""
    for rank in range(state[WORLD_SIZE]):
        line = state[CONTROL] + rank * CONTROL_BYTES + 8 * (state[OPERATION] % 2)
        if load_acquire(line + OPERATION_LENGTHS) != length * _LARGEST_ITEM + item_bytes:
            state[WAITING_FOR] = rank
            return False
        weights[rank] = carray(float64_pointer(line + OPERATION_WEIGHTS), 1)[0]
    return True


@inlined
def finish(state, chunks, results):
    """The operation is over: so many chunks were published, and so many slices shared."""
    state[SEQUENCE] += chunks
    state[RESULT_SEQUENCE] += results
    state[COPIED] = 0
    state[REDUCED] = 0
    state[COLLECTED] = 0
    state[OPERATION] += 1
    return DONE


@inlined
def zero_sums(bucket):
    """Nothing summed yet of a bucket's parameters."""
    own = carray(float64_pointer(bucket[OWN_SUMS]), bucket[PARAMETERS])
    mean = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    for i in range(bucket[PARAMETERS]):
        own[i] = 0.0
        mean[i] = 0.0


@inlined
def chunks_of(length, elements):
    """An empty bucket has one chunk, too: the ranks must meet."""
    return max(1, (length + elements - 1) // elements)


@inlined
def next_piece(ends, cursor, offset, position, stop):
    """The parameter of the element at `position`, searched from `cursor` on, and where its piece ends."""
    last = len(ends) - 1
    while cursor < last and ends[cursor] <= offset + position:
        cursor += 1
    end = min(stop, position + BLOCK)
    return cursor, end if cursor == last else min(end, ends[cursor] - offset)
