"""Numba loops over the elements of a gradient: what a chunk of the all-reduce costs is spent here.

A gradient is an array of float32 or float64, or of uint16 that holds bfloat16, or int16 that holds float16.
`widen` turns an element into the type that sums are made in (float32, float64 for float64), `narrow` turns it
back. Each loop runs over slices from index 0: an index that might be negative stops vectorisation, and so do two names for
one buffer. Only sums of squares may be reordered (`add_square`), never the gradients beside them.
"""

from __future__ import annotations

from ddp.transport.jit import add_square, inlined, narrow, types, widen

BLOCK = 8192  # elements whose squares are summed in the precision of the sums before float64 takes over
_TINY = 1e-30  # below, float32 squares may have underflowed


@inlined
def _exact_squares(values):
    total = 0.0
    for i in range(len(values)):
        total = add_square(total, types.float64(widen(values[i])))
    return total


@inlined
def _settle(partial, values):
    """The block's sum in float64; summed anew where the precision of the sums over- or underflowed."""
    total = types.float64(partial)
    if not (total < 1e37) or total < _TINY:
        return _exact_squares(values)
    return total


@inlined
def copy_block(slot, gradient, zero):
    """slot = gradient in the wire's type; returns the gradient's sum of squares."""
    partial = zero
    for i in range(len(gradient)):
        element = gradient[i]
        slot[i] = narrow(widen(element), slot)
        partial = add_square(partial, widen(element))
    return _settle(partial, gradient)


@inlined
def add_block(gradient, slot, own_weight, weight, zero):
    """gradient = own_weight * gradient + weight * slot, for two ranks; returns the sum of squares of the result."""
    partial = zero
    for i in range(len(gradient)):
        element = narrow(own_weight * widen(gradient[i]) + weight * widen(slot[i]), gradient)
        gradient[i] = element
        partial = add_square(partial, widen(element))
    return _settle(partial, gradient)


@inlined
def first_two_terms(total, first, second, first_weight, second_weight):
    """total = first_weight * first + second_weight * second"""
    for i in range(len(total)):
        total[i] = first_weight * widen(first[i]) + second_weight * widen(second[i])


@inlined
def next_two_terms(total, first, second, first_weight, second_weight):
    """total = (total + first_weight * first) + second_weight * second"""
    for i in range(len(total)):
        total[i] = (total[i] + first_weight * widen(first[i])) + second_weight * widen(second[i])


@inlined
def next_term(total, slot, weight):
    """total += weight * slot"""
    for i in range(len(total)):
        total[i] = total[i] + weight * widen(slot[i])


@inlined
def write_slice(out, total):
    """out = total"""
    for i in range(len(out)):
        out[i] = narrow(total[i], out)


@inlined
def write_block(gradient, total, zero):
    """gradient = total; returns the sum of squares of what is stored."""
    partial = zero
    for i in range(len(gradient)):
        element = narrow(total[i], gradient)
        gradient[i] = element
        partial = add_square(partial, widen(element))
    return _settle(partial, gradient)


@inlined
def scale_block(gradient, weight, zero):
    """gradient = weight * gradient; returns the sum of squares of the result."""
    partial = zero
    for i in range(len(gradient)):
        element = narrow(weight * widen(gradient[i]), gradient)
        gradient[i] = element
        partial = add_square(partial, widen(element))
    return _settle(partial, gradient)


@inlined
def measure_block(gradient, zero):
    """The sum of squares."""
    partial = zero
    for i in range(len(gradient)):
        partial = add_square(partial, widen(gradient[i]))
    return _settle(partial, gradient)


@inlined
def scaled(out, gradient, weight):
    """out = weight * gradient"""
    for i in range(len(out)):
        out[i] = weight * widen(gradient[i])


@inlined
def add_kept(out, gradient, kept, factor):
    """out = gradient + factor * kept"""
    for i in range(len(out)):
        out[i] = gradient[i] + factor * kept[i]


@inlined
def rescale(values, factor):
    """values *= factor"""
    for i in range(len(values)):
        values[i] = values[i] * factor


@inlined
def set_negative_zero(values):
    """What a sum begins with that keeps the sign of a single zero."""
    for i in range(len(values)):
        values[i] = -0.0
