"""The vector steps of the CPU kernels' loops, as LLVM instructions that numba puts in place of the calls.

Vectors have 8 float64; the compiler splits them for narrower processors. Tensors are addresses. A tag, a number of the
size of the row's numbers, says by its type what their bits mean. When a line here changes, `STEPS` in `_numba.py` has
to change with it (a test says to what), because numba keeps compiled loops until the loops' own file changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types

intrinsic: Any = extending.intrinsic  # its types describe the function that makes code, not the one that is called
#: stands for a dtype in the compiled functions' signatures
TAGS = {"float32": np.float32(0), "bfloat16": np.int16(0), "float16": np.uint16(0), "float64": np.float64(0)}
I32, I64, F32, F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


def tag_of(dtype: str) -> Any:
    """The tag of a dtype by torch's name; raises ValueError for those that cannot be combined."""
    if dtype not in TAGS:
        raise ValueError(f"numbers of dtype `{dtype}` cannot be combined; known: {', '.join(TAGS)}.")
    return TAGS[dtype]


def _vector(element: ir.Type, n: int, value: float | None = None) -> Any:
    """The type of n elements, or the constant that holds `value` n times."""
    kind = ir.VectorType(element, n)
    return kind if value is None else ir.Constant(kind, [value] * n)


def _pointer(b: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    return b.inttoptr(b.add(address, I64(offset)), kind.as_pointer())


def _load(b: ir.IRBuilder, address: ir.Value, offset: int, element: ir.Type, n: int, align: int = 1) -> ir.Value:
    return b.load(_pointer(b, address, offset, _vector(element, n)), align=align)


def _splat(b: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    empty = ir.Constant(_vector(value.type, n), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, value, I32(0)), empty, _vector(I32, n, 0))


def _parts(b: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    return [b.extract_value(value, j) for j in range(value.type.count)]


def _has(context: Any, feature: str) -> bool:
    """Whether the processor can do fused multiply-add (fma) or convert half precision (f16c)."""
    triple, _, features = context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",") or (feature == "fma" and triple.startswith(("aarch64", "arm64")))


def _multiply_add(context: Any, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z. One rounding or two is the same here, because the product is exact."""
    if not _has(context, "fma"):
        return b.fadd(z, b.fmul(x, y))
    name, kind = f"llvm.fma.v{z.type.count}f64", ir.FunctionType(z.type, [z.type] * 3)
    known = b.module.globals.get(name)
    return b.call(ir.Function(b.module, kind, name) if known is None else known, [x, y, z])


def _widen(context: Any, b: ir.IRBuilder, tag: Any, row: ir.Value, first: int, n: int) -> ir.Value:
    """n numbers of a row as float64, exactly, subnormal and not finite ones too."""
    at = first * tag.bitwidth // 8
    if tag == types.float64:
        return _load(b, row, at, F64, n)
    if tag == types.float32:
        narrow = _load(b, row, at, F32, n)
    elif tag == types.int16:
        bits = b.zext(_load(b, row, at, ir.IntType(16), n), _vector(I32, n))
        narrow = b.bitcast(b.shl(bits, _vector(I32, n, 16)), _vector(F32, n))
    elif _has(context, "f16c"):
        narrow = b.fpext(_load(b, row, at, ir.HalfType(), n), _vector(F32, n))
    else:  # exponent and mantissa in a float32's places are 2**112 too small; Inf and NaN get their exponent first
        bits = b.sext(_load(b, row, at, ir.IntType(16), n), _vector(I32, n))
        bits = b.and_(b.shl(bits, _vector(I32, n, 13)), _vector(I32, n, 0x8FFFE000))
        top = _vector(I32, n, 0x0F800000)
        special = b.icmp_unsigned("==", b.and_(bits, top), top)
        bits = b.select(special, b.or_(bits, _vector(I32, n, 0x7F800000)), bits)
        narrow = b.fmul(b.bitcast(bits, _vector(F32, n)), _vector(F32, n, 2.0**112))
    return b.fpext(narrow, _vector(F64, n))


@intrinsic
def size_of(typingctx: Any, tag: Any) -> Any:
    """Bytes of one number of a row."""
    return types.int64(tag), lambda context, b, sig, args: I64(tag.bitwidth // 8)


@intrinsic(prefer_literal=True)
def take(typingctx: Any, array: Any, first: Any, count: Any) -> Any:
    """Some numbers of a contiguous array as a tuple; `first` counts in its flat order."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        data = context.make_array(array)(context, b, args[0]).data
        items = [b.load(b.gep(data, [b.add(args[1], I64(j))])) for j in range(count.literal_value)]
        return context.make_tuple(b, sig.return_type, items)

    return types.UniTuple(array.dtype, count.literal_value)(array, types.int64, count), codegen


@intrinsic
def shift(typingctx: Any, rows: Any, offset: Any) -> Any:
    """Addresses `offset` bytes on."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return context.make_tuple(b, sig.return_type, [b.add(row, args[1]) for row in _parts(b, args[0])])

    return rows(rows, types.int64), codegen


@intrinsic
def advance(typingctx: Any, rows: Any, live: Any, offset: Any) -> Any:
    """Addresses `offset` bytes on, where `live` has all bits set, and as they are where it has none."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pairs = zip(_parts(b, args[0]), _parts(b, args[1]), strict=True)
        return context.make_tuple(b, sig.return_type, [b.add(row, b.and_(args[2], bits)) for row, bits in pairs])

    return rows(rows, live, types.int64), codegen


@intrinsic
def fetch(typingctx: Any, tag: Any, rows: Any, offset: Any) -> Any:
    """Ask for the 32 columns at `offset` bytes of some rows: into the second-level cache, the first is too small."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        call = b.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        for line in range(0, 4 * tag.bitwidth, 64):
            for row in _parts(b, args[1]):
                at = b.inttoptr(b.add(b.add(row, args[2]), I64(line)), byte)
                b.call(call, [at, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(tag, rows, offset), codegen


@intrinsic(prefer_literal=True)
def step(typingctx: Any, tag: Any, acc: Any, pitch: Any, rows: Any, coefs: Any, width: Any) -> Any:
    """acc_bi += sum_r coef_br row_ri for `width` columns i, in row order, with the sums in registers.

    `acc` is the first candidate's address, `pitch` the bytes to the next; as many candidates as len(coefs) / len(rows).
    """

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        rows, scale = _parts(b, args[3]), [_splat(b, coef, n) for coef in _parts(b, args[4])]
        accs = [b.add(args[1], b.mul(args[2], I64(m))) for m in range(len(scale) // len(rows))]
        sums = {(m, i): _load(b, acc, 8 * i, F64, n, 8) for m, acc in enumerate(accs) for i in starts}
        for r, row in enumerate(rows):
            for i in starts:
                wide = _widen(context, b, tag, row, i, n)
                for m in range(len(accs)):
                    sums[m, i] = _multiply_add(context, b, scale[m * len(rows) + r], wide, sums[m, i])
        for (m, i), value in sums.items():
            b.store(value, _pointer(b, accs[m], 8 * i, value.type), align=8)
        return context.get_dummy_value()

    n = min(8, width.literal_value)
    starts = range(0, width.literal_value, n)
    return types.void(tag, acc, pitch, rows, coefs, width), codegen


@intrinsic(prefer_literal=True)
def dot(typingctx: Any, tag: Any, acc: Any, rows: Any, grad: Any, width: Any) -> Any:
    """acc_ri += row_ri grad_i for `width` columns i; the rows' sums lie 32 numbers apart."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        for i in range(0, width.literal_value, n):
            slope = b.fpext(_load(b, args[3], 4 * i, F32, n), _vector(F64, n))
            for r, row in enumerate(_parts(b, args[2])):
                place = _pointer(b, args[1], 256 * r + 8 * i, _vector(F64, n))
                wide = _widen(context, b, tag, row, i, n)
                b.store(_multiply_add(context, b, wide, slope, b.load(place, align=8)), place, align=8)
        return context.get_dummy_value()

    n = min(8, width.literal_value)
    return types.void(tag, acc, rows, grad, width), codegen


@intrinsic(prefer_literal=True)
def narrow(typingctx: Any, acc: Any, out: Any, width: Any, bypass: Any) -> Any:
    """out = float32(acc) for `width` columns; 0 when all are finite. `bypass`: past the caches, `out` at a line."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        value = b.fptrunc(_load(b, args[0], 0, F64, n, 8), _vector(F32, n))
        store = b.store(value, _pointer(b, args[1], 0, value.type), align=64 if bypass.literal_value else 4)
        if bypass.literal_value:
            store.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))
        top = _vector(I32, n, 0x7F800000)
        bad = b.icmp_unsigned("==", b.and_(b.bitcast(value, _vector(I32, n)), top), top)
        return b.zext(b.bitcast(bad, ir.IntType(n)), I64)

    n = width.literal_value
    return types.int64(acc, out, width, bypass), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Order stores that bypassed the caches before whatever follows."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
