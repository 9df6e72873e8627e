"""Entropy coders: exact, as small as theory says, and as small as another implementation's."""

import numpy as np
import pytest

from lcsc.codec.coders import entropy_bits
from lcsc.kernels import entropy


def drawn(rng, num, size, contexts):
    """Symbols whose shares depend on a context, and the contexts."""
    ctx_N = rng.integers(0, contexts, num).astype(np.int32)
    share = rng.dirichlet(np.full(size, 0.3), size=contexts)
    above = share.cumsum(1)[ctx_N] < rng.random(num)[:, None]
    return np.minimum(above.sum(1), size - 1).astype(np.uint8), ctx_N


@pytest.mark.parametrize(("size", "contexts"), [(2, 1), (3, 4), (16, 8)])
def test_adaptive_symbols_come_back_near_the_entropy_of_the_counts(size, contexts):
    rng = np.random.default_rng(0)
    sym_N, ctx_N = drawn(rng, 6_000, size, contexts)
    coarse_N = np.zeros_like(ctx_N)
    data = entropy.encode_adaptive(sym_N, ctx_N, coarse_N, entropy.fresh_counts(contexts, 1, size))
    again = entropy.decode_adaptive(data, ctx_N, coarse_N, entropy.fresh_counts(contexts, 1, size))
    assert np.array_equal(again, sym_N)

    fine, coarse = entropy.fresh_counts(contexts, 1, size)
    own = 0.0  # the model's own entropy, added up beside the coder
    for s, c in zip(sym_N.tolist(), ctx_N.tolist(), strict=True):
        share = (fine[c] + coarse[0]) / (fine[c].sum() + coarse[0].sum())
        own -= np.log2(share[s])
        fine[c, s] += entropy.FINE
        coarse[0, s] += entropy.COARSE
        if coarse[0].sum() > entropy.COARSE_LIMIT:
            coarse[0] = np.maximum(coarse[0] >> 1, 1)
    assert abs(8 * len(data) - own) <= max(64, 0.0005 * own)


def test_adaptive_coder_is_as_small_as_constriction_with_the_same_shares():
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(1)
    sym_N, zeros = drawn(rng, 50_000, 16, 1)[0], np.zeros(50_000, np.int32)
    own = entropy.encode_adaptive(sym_N, zeros, zeros, entropy.fresh_counts(1, 1, 16))
    share = np.bincount(sym_N, minlength=16).astype(np.float32)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(sym_N.astype(np.int32), constriction.stream.model.Categorical(share / share.sum(), perfect=False))
    assert len(own) <= 4 * len(coder.get_compressed()) + 64  # 15 shares were learned, not given


@pytest.mark.parametrize("contexts", [1, 5])
def test_static_bytes_come_back_near_their_entropy(contexts):
    rng = np.random.default_rng(2)
    ctx_N = rng.integers(0, contexts, 60_000).astype(np.uint16)
    sym_N = (rng.integers(0, 256, 60_000) & rng.integers(0, 256, 60_000) & (ctx_N * 37 + 91)).astype(np.uint8)
    counts = np.bincount(ctx_N.astype(np.int64) * 256 + sym_N, minlength=256 * contexts).reshape(contexts, 256)
    freq = entropy.frequencies(counts)
    assert (freq.sum(1) == 1 << entropy.PRECISION).all()
    data = entropy.encode_static(sym_N, ctx_N, freq)
    assert np.array_equal(entropy.decode_static(data, ctx_N, freq), sym_N)
    assert entropy_bits(counts) <= 8 * len(data) <= 1.005 * entropy_bits(counts) + 128


def test_zeros_take_next_to_nothing_and_noise_no_more_than_itself():
    zeros, noise = np.zeros(100_000, np.int32), np.random.default_rng(3).integers(0, 16, 100_000)
    assert len(entropy.encode_adaptive(zeros.astype(np.uint8), zeros, zeros, entropy.fresh_counts(1, 1, 16))) < 64
    data = entropy.encode_adaptive(noise.astype(np.uint8), zeros, zeros, entropy.fresh_counts(1, 1, 16))
    assert 0.5 * 100_000 < len(data) < 0.5025 * 100_000


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_differences_split_and_join(bits):
    rng = np.random.default_rng(bits)
    most = (1 << bits) - 1
    edges = [0, 1, 2, 3, 4, 5, 7, 8, most, most - 1, most - 7, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    some = (rng.integers(0, 2**63, 500, dtype=np.uint64) >> rng.integers(0, 63, 500).astype(np.uint64)) & np.uint64(
        most
    )
    delta_N = np.concatenate([np.array(edges, np.uint64), some])
    token_N, width_N, again = np.empty(len(delta_N), np.uint8), np.empty(len(delta_N), np.uint8), delta_N.copy()
    rest_N, widths, unpacked = np.empty_like(delta_N), width_N.copy(), np.empty_like(delta_N)
    entropy.split_delta(delta_N, bits, token_N, rest_N, width_N)
    out = np.empty(int(width_N.sum()) // 8 + 1, np.uint8)
    packed = np.frombuffer(out[: entropy.pack_bits(rest_N, width_N, out)].tobytes(), np.uint8)
    entropy.widths_of(token_N, bits, widths)
    assert np.array_equal(widths, width_N)
    entropy.unpack_bits(packed, width_N, unpacked)
    entropy.join_delta(token_N, unpacked, bits, again)
    assert np.array_equal(again, delta_N)
