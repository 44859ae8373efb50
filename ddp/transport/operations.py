"""The operations that ranks of one node make of chunks: all-reduce, and its halves.

Each rank owns a ring of `depth` chunks in shared memory that stays in cache. For chunk k a rank writes its
gradient into slot k mod depth and *publishes* k + 1; readers wait for that, and mark the slot *taken* once they
need it no more; it is written again only when all have taken it. What a reader makes of a chunk:

- whole: it adds all ranks' slots, each times its rank's weight, in rank order, into its bucket;
- slices (many ranks): it adds only its own slice of the chunk and *shares* the sum in a second ring, from
  which everyone *gathers* the slices. Split in two, these are `reduce_scatter` and `all_gather`.

Additions are elementwise and in rank order, so the result is the same bits on every rank, in every run and for
every split of the gradient into buckets. Sums of squares, one a parameter, ride along.
"""

from __future__ import annotations

from ddp.transport.blocks import scale_block, scaled, write_slice
from ddp.transport.chunks import (
    add_up,
    await_chunk,
    copy_chunk,
    gather_chunk,
    measure,
    place_is_free,
    reduce_slice,
    share,
    store_mean,
    take_chunk,
)
from ddp.transport.jit import carray, float64_pointer, inlined, int64_pointer, pointer_like
from ddp.transport.protocol import (
    AHEAD,
    CHUNK_BYTES,
    COLLECTED,
    COPIED,
    DONE,
    ENDS,
    MEAN_SUM,
    MEAN_SUMS,
    OPERATION,
    OWN_SUM,
    PARAMETERS,
    RANK,
    REDUCED,
    RESULT_SEQUENCE,
    SEQUENCE,
    SLICES_FROM,
    SMALL_BUCKET_BYTES,
    STREAM_BYTES,
    WAITING,
    WORLD_SIZE,
    begin,
    chunks_of,
    finish,
    next_piece,
    private,
    shared_slice,
    slice_of,
    zero_sums,
)


@inlined
def slices_length(length, elements, rank, world_size):
    """Elements of all of `rank`'s slices of `length` elements in chunks of `elements`."""
    full = length // elements
    first, last = slice_of(elements, rank, world_size)
    start, stop = slice_of(length - full * elements, rank, world_size)
    return full * (last - first) + stop - start


@inlined
def _by_whole_chunks(state, sums, bucket, gradient, wire, totals, weights, zero):
    large = len(gradient) * gradient.itemsize > state[SMALL_BUCKET_BYTES]
    elements = (state[STREAM_BYTES] if large else state[CHUNK_BYTES]) // gradient.itemsize
    chunks = chunks_of(len(gradient), elements)
    while state[REDUCED] < chunks:
        if state[COPIED] < min(chunks, state[REDUCED] + state[AHEAD]):
            if not copy_chunk(state, sums, bucket, gradient, wire, elements, zero):
                return WAITING
            continue
        status = await_chunk(state, len(gradient), gradient.itemsize, weights)
        if status != DONE:
            return status
        chunk, start = state[SEQUENCE] + state[REDUCED], state[REDUCED] * elements
        stop = min(start + elements, len(gradient))
        sums[MEAN_SUM] += add_up(state, bucket, gradient, wire, chunk, start, stop, totals, weights, zero)
        take_chunk(state)
    return finish(state, chunks, 0)


@inlined
def _by_slices(state, sums, bucket, gradient, wire, totals, weights, zero):
    elements = state[CHUNK_BYTES] // gradient.itemsize
    chunks = chunks_of(len(gradient), elements)
    while state[COLLECTED] < chunks:
        if state[COPIED] < min(chunks, state[COLLECTED] + state[AHEAD] + 1):
            if not copy_chunk(state, sums, bucket, gradient, wire, elements, zero):
                return WAITING
        elif state[REDUCED] < min(chunks, state[COLLECTED] + state[AHEAD]):
            status = await_chunk(state, len(gradient), gradient.itemsize, weights)
            if status != DONE:
                return status
            if not place_is_free(state):
                return WAITING
            length = min(elements, len(gradient) - state[REDUCED] * elements)
            out = shared_slice(state, totals, state[RANK], state[RESULT_SEQUENCE] + state[REDUCED], elements)
            reduce_slice(state, out, wire, state[SEQUENCE] + state[REDUCED], length, weights)
            share(state)
            take_chunk(state)
        elif not gather_chunk(state, sums, bucket, gradient, totals, elements, zero):
            return WAITING
    return finish(state, chunks, chunks)


@inlined
def _alone(state, sums, bucket, gradient, weight, zero):
    """One rank needs no ring: gradient *= weight."""
    ends = carray(int64_pointer(bucket[ENDS]), bucket[PARAMETERS])
    mean = carray(float64_pointer(bucket[MEAN_SUMS]), bucket[PARAMETERS])
    sums[OWN_SUM] = measure(state, bucket, gradient, 0, len(gradient), zero)
    cursor, position = 0, 0
    while position < len(gradient):
        cursor, end = next_piece(ends, cursor, 0, position, len(gradient))
        squares = scale_block(gradient[position:end], weight, zero)
        mean[cursor] += squares
        sums[MEAN_SUM] += squares
        position = end
    state[OPERATION] += 1
    return DONE


@inlined
def all_reduce(state_address, bucket_address, gradient, wire, weight, zero):
    """gradient = the weighted sum over ranks. `zero` is of the type that sums are made in."""
    state, sums, bucket, totals, weights = private(state_address, bucket_address, zero)
    if state[COPIED] == 0:
        begin(state, sums, len(gradient), gradient.itemsize, weight)
        zero_sums(bucket)
    if state[WORLD_SIZE] == 1:
        weights[0] = weight
        return _alone(state, sums, bucket, gradient, weights[0], zero)
    if len(gradient) < state[SLICES_FROM]:
        return _by_whole_chunks(state, sums, bucket, gradient, wire, totals, weights, zero)
    return _by_slices(state, sums, bucket, gradient, wire, totals, weights, zero)


@inlined
def reduce_scatter(state_address, bucket_address, gradient, out_address, weight, zero):
    """out = this rank's slices of all chunks of the weighted sum, one after the other; gradient stays as it is."""
    state, sums, bucket, _, weights = private(state_address, bucket_address, zero)
    elements = state[CHUNK_BYTES] // gradient.itemsize
    length = slices_length(len(gradient), elements, state[RANK], state[WORLD_SIZE])
    out = carray(pointer_like(zero, out_address), length)
    chunks = chunks_of(len(gradient), elements)
    first, last = slice_of(elements, state[RANK], state[WORLD_SIZE])
    if state[COPIED] == 0:
        begin(state, sums, len(gradient), gradient.itemsize, weight)
    if state[WORLD_SIZE] == 1:
        weights[0] = weight
        sums[OWN_SUM] = measure(state, bucket, gradient, 0, len(gradient), zero)
        scaled(out, gradient, weights[0])
        return finish(state, 0, 0)
    while state[REDUCED] < chunks:
        if state[COPIED] < min(chunks, state[REDUCED] + state[AHEAD]):
            if not copy_chunk(state, sums, bucket, gradient, gradient, elements, zero):
                return WAITING
            continue
        status = await_chunk(state, len(gradient), gradient.itemsize, weights)
        if status != DONE:
            return status
        length = min(elements, len(gradient) - state[REDUCED] * elements)
        part = out[state[REDUCED] * (last - first) :]
        reduce_slice(state, part, gradient, state[SEQUENCE] + state[REDUCED], length, weights)
        take_chunk(state)
    return finish(state, chunks, 0)


@inlined
def all_gather(state_address, bucket_address, gradient, own_address, zero):
    """gradient = all ranks' slices of all chunks; `own` holds this rank's, as `reduce_scatter` gave them."""
    state, sums, bucket, totals, _ = private(state_address, bucket_address, zero)
    elements = state[CHUNK_BYTES] // gradient.itemsize
    length = slices_length(len(gradient), elements, state[RANK], state[WORLD_SIZE])
    own = carray(pointer_like(zero, own_address), length)
    chunks = chunks_of(len(gradient), elements)
    first, last = slice_of(elements, state[RANK], state[WORLD_SIZE])
    if state[REDUCED] == 0:
        begin(state, sums, len(gradient), gradient.itemsize, 0.0)
    if state[WORLD_SIZE] == 1:
        sums[MEAN_SUM] = store_mean(state, bucket, gradient, 0, len(gradient), own, zero)
        return finish(state, 0, 0)
    while state[COLLECTED] < chunks:
        if state[REDUCED] < min(chunks, state[COLLECTED] + state[AHEAD]):
            if not place_is_free(state):
                return WAITING
            result, start = state[RESULT_SEQUENCE] + state[REDUCED], state[REDUCED] * (last - first)
            here, there = slice_of(  # of the last chunk a late rank may have more than of a full one
                min(elements, len(gradient) - state[REDUCED] * elements), state[RANK], state[WORLD_SIZE]
            )
            part = own[start : start + there - here]
            write_slice(shared_slice(state, totals, state[RANK], result, len(part)), part)
            share(state)
            state[REDUCED] += 1
        elif not gather_chunk(state, sums, bucket, gradient, totals, elements, zero):
            return WAITING
    return finish(state, 0, chunks)
