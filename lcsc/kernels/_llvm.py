"""The vector code of the CPU kernels: what one step of their loops does, as LLVM instructions on vectors of 8 float64.

The compiler splits the vectors for narrower processors. Nothing here imports numba; `context` is numba's, for the
processor's features. A changed line here needs the new digest in `_numba.py` (a test says which).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I32, I64, F32, F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
LANES = 8


def vector(element: ir.Type, n: int, value: float | None = None) -> Any:
    """The type of n elements, or the constant that holds `value` n times."""
    kind = ir.VectorType(element, n)
    return kind if value is None else ir.Constant(kind, [value] * n)


def pointer(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    """Where `address` + `offset` bytes points to."""
    return b.inttoptr(b.add(address, I64(offset)), kind.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, offset: int, element: ir.Type, n: int, align: int = 1) -> ir.Value:
    """n numbers."""
    return b.load(pointer(b, address, offset, vector(element, n)), align=align)


def splat(b: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    """One number n times."""
    empty = ir.Constant(vector(value.type, n), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, value, I32(0)), empty, vector(I32, n, 0))


def has(context: Any, feature: str) -> bool:
    """Whether the processor that code is made for can do fused multiply-add (fma) or convert half precision (f16c)."""
    triple, _, features = context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",") or (feature == "fma" and triple.startswith(("aarch64", "arm64")))


def multiply_add(context: Any, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z. One rounding or two is the same here, because the product is exact."""
    if not has(context, "fma"):
        return b.fadd(z, b.fmul(x, y))
    name, kind = f"llvm.fma.v{z.type.count}f64", ir.FunctionType(z.type, [z.type] * 3)
    known = b.module.globals.get(name)
    return b.call(ir.Function(b.module, kind, name) if known is None else known, [x, y, z])


def widen(context: Any, b: ir.IRBuilder, dtype: str, address: ir.Value, offset: int, n: int) -> ir.Value:
    """n numbers of a row as float64, exactly, subnormal and not finite ones too."""
    if dtype == "float64":
        return load(b, address, offset, F64, n)
    if dtype == "float32":
        narrow = load(b, address, offset, F32, n)
    elif dtype == "bfloat16":
        bits = b.zext(load(b, address, offset, ir.IntType(16), n), vector(I32, n))
        narrow = b.bitcast(b.shl(bits, vector(I32, n, 16)), vector(F32, n))
    elif has(context, "f16c"):
        narrow = b.fpext(load(b, address, offset, ir.HalfType(), n), vector(F32, n))
    else:  # exponent and mantissa in a float32's places are 2**112 too small; Inf and NaN get their exponent first
        bits = b.sext(load(b, address, offset, ir.IntType(16), n), vector(I32, n))
        bits = b.and_(b.shl(bits, vector(I32, n, 13)), vector(I32, n, 0x8FFFE000))
        top = vector(I32, n, 0x0F800000)
        special = b.icmp_unsigned("==", b.and_(bits, top), top)
        bits = b.select(special, b.or_(bits, vector(I32, n, 0x7F800000)), bits)
        narrow = b.fmul(b.bitcast(bits, vector(F32, n)), vector(F32, n, 2.0**112))
    return b.fpext(narrow, vector(F64, n))


def fetch(b: ir.IRBuilder, rows: Sequence[ir.Value], offset: ir.Value, nbytes: int) -> None:
    """Ask for the next bytes of some rows, into the second-level cache: four rows of a chunk do not fit the first."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    call = b.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
    for line in range(0, nbytes, 64):
        for row in rows:
            at = b.inttoptr(b.add(b.add(row, offset), I64(line)), byte)
            b.call(call, [at, I32(0), I32(2), I32(1)])


def add(
    context: Any,
    b: ir.IRBuilder,
    dtype: str,
    itemsize: int,
    accs: Sequence[ir.Value],
    rows: Sequence[ir.Value],
    coefs: Sequence[ir.Value],
    width: int,
) -> None:
    """acc_mi += sum_r coef_mr row_ri for `width` columns i, in row order, with the accumulators in registers."""
    n = min(LANES, width)
    starts = range(0, width, n)
    sums = {(m, i): load(b, acc, 8 * i, F64, n, 8) for m, acc in enumerate(accs) for i in starts}
    scale = [splat(b, coef, n) for coef in coefs]
    for r, row in enumerate(rows):
        for i in starts:
            wide = widen(context, b, dtype, row, i * itemsize, n)
            for m in range(len(accs)):
                sums[m, i] = multiply_add(context, b, scale[m * len(rows) + r], wide, sums[m, i])
    for (m, i), value in sums.items():
        b.store(value, pointer(b, accs[m], 8 * i, value.type), align=8)


def dot(
    context: Any,
    b: ir.IRBuilder,
    dtype: str,
    itemsize: int,
    accs: Sequence[ir.Value],
    rows: Sequence[ir.Value],
    grad: ir.Value,
    width: int,
) -> None:
    """acc_ri += row_ri grad_i for `width` columns i."""
    n = min(LANES, width)
    for i in range(0, width, n):
        slope = b.fpext(load(b, grad, 4 * i, F32, n), vector(F64, n))
        for acc, row in zip(accs, rows, strict=True):
            place = pointer(b, acc, 8 * i, vector(F64, n))
            wide = widen(context, b, dtype, row, i * itemsize, n)
            b.store(multiply_add(context, b, wide, slope, b.load(place, align=8)), place, align=8)


def narrow(b: ir.IRBuilder, acc: ir.Value, out: ir.Value, width: int, bypass: bool) -> ir.Value:
    """out = float32(acc) for `width` columns, past the caches if asked (out is then at a cache line); 0 if finite."""
    value = b.fptrunc(load(b, acc, 0, F64, width, 8), vector(F32, width))
    store = b.store(value, pointer(b, out, 0, value.type), align=64 if bypass else 4)
    if bypass:
        store.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))
    top = vector(I32, width, 0x7F800000)
    bad = b.icmp_unsigned("==", b.and_(b.bitcast(value, vector(I32, width)), top), top)
    return b.zext(b.bitcast(bad, ir.IntType(width)), I64)
