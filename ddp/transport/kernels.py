"""The Numba kernels that Python calls, one a dtype, written out: Numba would not find a closure in its cache again.

Each takes the addresses of `state`, of the gradient (and its length), this rank's weight, the address of the bucket's
description, and for the halves that of this rank's slices. It returns DONE, WAITING (call it again) or MISMATCH.
"""

from __future__ import annotations

from ddp.transport import operations
from ddp.transport.jit import (
    carray,
    compiled,
    float32_pointer,
    float64_pointer,
    int8_pointer,
    int16_pointer,
    int64_pointer,
    load_acquire,
    on_demand,
    store_release,
    types,
    uint16_pointer,
)
from ddp.transport.operations import all_gather, all_reduce, reduce_scatter
from ddp.transport.protocol import (
    CONTROL,
    CONTROL_BYTES,
    DONE,
    RANK,
    ROW_SEQUENCE,
    ROWS,
    ROWS_PUBLISHED,
    STATE_LENGTH,
    WAITING,
    WORLD_SIZE,
    announce,
    await_all,
)
from ddp.transport.row import ROW_LENGTH

_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64, types.int64)
_HALF_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.float64, types.int64, types.int64)


@compiled(_SIGNATURE)
def all_reduce_float32(state, data, length, weight, bucket):
    """Average float32 in place."""
    gradient = carray(float32_pointer(data), length)
    return all_reduce(state, bucket, gradient, gradient, weight, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_float64(state, data, length, weight, bucket):
    """Average float64 in place."""
    gradient = carray(float64_pointer(data), length)
    return all_reduce(state, bucket, gradient, gradient, weight, types.float64(0))


@on_demand(_SIGNATURE)
def all_reduce_bfloat16(state, data, length, weight, bucket):
    """Average bfloat16 in place, summed in float32."""
    gradient = carray(uint16_pointer(data), length)
    return all_reduce(state, bucket, gradient, gradient, weight, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_float16(state, data, length, weight, bucket):
    """Average float16 in place, summed in float32."""
    gradient = carray(int16_pointer(data), length)
    return all_reduce(state, bucket, gradient, gradient, weight, types.float32(0))


@on_demand(_SIGNATURE)
def all_reduce_encoded_float32(state, data, length, weight, bucket):
    """Average float32 in place; between the ranks it travels as `state[WIRE]` says."""
    gradient, codes = carray(float32_pointer(data), length), carray(int8_pointer(state), 1)
    return all_reduce(state, bucket, gradient, codes, weight, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float32(state, data, length, weight, bucket, slices):
    """This rank's slices of the weighted sum, as float32."""
    return reduce_scatter(state, bucket, carray(float32_pointer(data), length), slices, weight, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float32(state, data, length, weight, bucket, slices):
    """The mean from all ranks' slices; `weight` is not used."""
    return all_gather(state, bucket, carray(float32_pointer(data), length), slices, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float64(state, data, length, weight, bucket, slices):
    """This rank's slices of the weighted sum, as float64."""
    return reduce_scatter(state, bucket, carray(float64_pointer(data), length), slices, weight, types.float64(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float64(state, data, length, weight, bucket, slices):
    """The mean from all ranks' slices; `weight` is not used."""
    return all_gather(state, bucket, carray(float64_pointer(data), length), slices, types.float64(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_bfloat16(state, data, length, weight, bucket, slices):
    """This rank's slices of the weighted sum, as float32."""
    return reduce_scatter(state, bucket, carray(uint16_pointer(data), length), slices, weight, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_bfloat16(state, data, length, weight, bucket, slices):
    """The mean from all ranks' slices; `weight` is not used."""
    return all_gather(state, bucket, carray(uint16_pointer(data), length), slices, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def reduce_scatter_float16(state, data, length, weight, bucket, slices):
    """This rank's slices of the weighted sum, as float32."""
    return reduce_scatter(state, bucket, carray(int16_pointer(data), length), slices, weight, types.float32(0))


@on_demand(_HALF_SIGNATURE)
def all_gather_float16(state, data, length, weight, bucket, slices):
    """The mean from all ranks' slices; `weight` is not used."""
    return all_gather(state, bucket, carray(int16_pointer(data), length), slices, types.float32(0))


@compiled(types.int64(types.int64, types.int64, types.int64))
def exchange_rows(state_address, row_address, rows_address):
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
    announce(control + ROWS_PUBLISHED, state[ROW_SEQUENCE] + 1)
    if not await_all(state, ROWS_PUBLISHED, state[ROW_SEQUENCE] + 1):
        return WAITING
    rows = carray(float64_pointer(rows_address), state[WORLD_SIZE] * ROW_LENGTH)
    for rank in range(state[WORLD_SIZE]):
        slot = carray(float64_pointer(state[CONTROL] + rank * CONTROL_BYTES + place), ROW_LENGTH)
        for i in range(ROW_LENGTH):
            rows[rank * ROW_LENGTH + i] = slot[i]
    state[ROW_SEQUENCE] += 1
    return DONE


@on_demand(types.int64(types.int64, types.int64, types.int64, types.int64))
def slices_length(length, elements, rank, world_size):
    """As `operations.slices_length`."""
    return operations.slices_length(length, elements, rank, world_size)


@compiled(types.int64(types.int64))
def load(address):
    """The int64 at `address`, acquired."""
    return load_acquire(address)


@compiled(types.void(types.int64, types.int64))
def store(address, value):
    """Release `value` to `address`."""
    store_release(address, value)
