"""What Numba lacks: atomics, pause, futex, a clock, typed pointers, 16-bit floats.

Acquire and release order is stated although x86 hides its absence: ARM does not.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import ir
from numba import carray as carray
from numba import types

from ddp.transport.compiling import chosen_by_type as chosen_by_type
from ddp.transport.compiling import compiled as compiled
from ddp.transport.compiling import inlined as inlined
from ddp.transport.compiling import intrinsic as intrinsic
from ddp.transport.compiling import on_demand as on_demand

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_syscall = types.ExternalFunction(
    "syscall",
    types.int64(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64),
)
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_CLOCK_MONOTONIC = 1

SUPPORTED = _SYS_FUTEX > 0 and platform.system() == "Linux"


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """The int64 at `address`; later reads of this thread see what its writer wrote before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the int64 `value` at `address` after all earlier writes of this thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, sequentially consistent; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def full_fence(typingctx: Any) -> Any:
    """No later load of this thread passes an earlier store."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def cpu_pause(typingctx: Any) -> Any:
    """Tell the core that this is a spinning wait."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])
        elif platform.machine() == "aarch64":
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            yield_hint = ir.Constant(ir.IntType(32), 1)
            builder.call(builder.module.declare_intrinsic("llvm.aarch64.hint", (), kind), [yield_hint])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def pointer_like(typingctx: Any, like: Any, address: Any) -> Any:
    """`address` as a pointer to numbers like `like`, or like its elements; for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(getattr(like, "dtype", like))(like, types.int64), generate


def _typed_pointer(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


int64_pointer = _typed_pointer(types.int64)
float32_pointer = _typed_pointer(types.float32)
float64_pointer = _typed_pointer(types.float64)
uint16_pointer = _typed_pointer(types.uint16)
int16_pointer = _typed_pointer(types.int16)
int8_pointer = _typed_pointer(types.int8)


@intrinsic
def add_square(typingctx: Any, total: Any, value: Any) -> Any:
    """`total + value * value`, free to be reordered: only this sum may, never the gradients beside it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("reassoc", "contract", "nsz")
        square = builder.fmul(arguments[1], arguments[1], flags=flags)
        return builder.fadd(arguments[0], square, flags=flags)

    return total(total, value), generate


@intrinsic
def add_product(typingctx: Any, total: Any, first: Any, second: Any) -> Any:
    """`total + first * second`, free to be reordered."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("reassoc", "contract", "nsz")
        return builder.fadd(arguments[0], builder.fmul(arguments[1], arguments[2], flags=flags), flags=flags)

    return total(total, first, second), generate


def _widened(builder: Any, bits: Any, is_float16: bool) -> Any:
    if is_float16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
    word = builder.zext(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(word, ir.IntType(32)(16)), ir.FloatType())


def _float16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))


def _bfloat16(builder: Any, value: Any) -> Any:
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(is_nan, builder.or_(bits, word(0x400000)), rounded)
    return builder.trunc(builder.lshr(chosen, word(16)), ir.IntType(16))


@intrinsic
def widen(typingctx: Any, element: Any) -> Any:
    """A gradient's element in the type that sums are made in; uint16 holds a bfloat16, int16 a float16. Exact."""
    real = element if isinstance(element, types.Float) else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0] if real == element else _widened(builder, arguments[0], element == types.int16)

    return real(element), generate


@intrinsic
def narrow(typingctx: Any, value: Any, like: Any) -> Any:
    """`value` rounded to the element type of the array `like`: to nearest, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == like.dtype:
            return arguments[0]
        return _float16(builder, arguments[0]) if like.dtype == types.int16 else _bfloat16(builder, arguments[0])

    return like.dtype(value, like), generate


@intrinsic
def bfloat16_value(typingctx: Any, bits: Any) -> Any:
    """float32 of the 16 bits of a bfloat16; exact."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widened(builder, arguments[0], False)

    return types.float32(types.uint16), generate


@intrinsic
def float16_value(typingctx: Any, bits: Any) -> Any:
    """float32 of the 16 bits of a float16; exact."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widened(builder, arguments[0], True)

    return types.float32(types.uint16), generate


@intrinsic
def float16_bits(typingctx: Any, value: Any) -> Any:
    """The 16 bits of the float16 nearest to a float32, ties to even; too large a value gives infinity."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _float16(builder, arguments[0])

    return types.uint16(types.float32), generate


@intrinsic
def bfloat16_bits(typingctx: Any, value: Any) -> Any:
    """The 16 bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _bfloat16(builder, arguments[0])

    return types.uint16(types.float32), generate


@inlined
def monotonic_nanoseconds(scratch: int) -> int:
    """CLOCK_MONOTONIC; `scratch` is the address of two int64 of this thread."""
    _clock_gettime(_CLOCK_MONOTONIC, scratch)
    clock = numba.carray(int64_pointer(scratch), 2)
    return clock[0] * 1_000_000_000 + clock[1]


@inlined
def futex_wait(address: int, expected: int, timeout_nanoseconds: int, scratch: int) -> None:
    """Sleep while the low 32 bits at `address` equal `expected`'s, at most the timeout."""
    timeout = numba.carray(int64_pointer(scratch), 2)
    timeout[0] = timeout_nanoseconds // 1_000_000_000
    timeout[1] = timeout_nanoseconds % 1_000_000_000
    _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, expected & 0xFFFFFFFF, scratch, 0, 0)


@inlined
def futex_wake_all(address: int) -> None:
    _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


@inlined
def yield_core() -> None:
    _sched_yield()
