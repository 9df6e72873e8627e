"""Coded checkpoints: every bit back, or the loss that was asked for, or one sentence."""

import dataclasses
import itertools

import numpy as np
import pytest

from lcsc.codec.arrays import Array
from lcsc.codec.chain import Chain, ChainWriter, file_name
from lcsc.codec.settings import CodecSettings
from lcsc.core.dtypes import ITEMSIZE, raw_dtype
from lcsc.core.errors import BankError, ConfigError, MissingExtraError, NonFiniteError, OutputExistsError

LOSSY = CodecSettings("lossy", anchor_every=4)


def bits(array):
    return array.bits.tobytes()


def of_every_dtype(rng):
    """Random bits of every dtype: numbers, infinities and NaNs of any payload, both zeros."""
    found = {}
    for dtype, size in ITEMSIZE.items():
        values = rng.integers(0, 256, 7 * 5 * size, dtype=np.uint8)
        values[: 2 * size] = 0
        values[2 * size - 1] = 0x80  # -0.0
        if dtype == "bool":
            values &= 1
        found[dtype] = Array(dtype, values.view(raw_dtype(dtype)).reshape(7, 5))
    nan = np.array([0x7FC00001, 0xFFFFFFFF, 0x7F800001, 0x80000000, 0x7F800000], np.uint32)
    return found | {
        "nan": Array("float32", nan.view("<f4")),
        "scalar": Array("float32", np.float32(rng.normal())),
        "empty": Array("int64", np.empty((0, 3), np.int64)),
        "strided": Array("float32", rng.normal(size=(6, 8)).astype("f4")[::2, ::-1]),
    }


class Training:
    """Weights and moments of an Adam that follows noise, with sizes as of a trained network."""

    def __init__(self, shape=(48, 64), seed=0, rate=1e-3):
        self.rng, self.step, self.rate = np.random.default_rng(seed), 0, rate
        self.w = self.rng.normal(size=shape).astype("f4") * np.float32(0.02)
        self.scale = np.exp(self.rng.normal(size=shape[0]) * 1.5).astype("f4")[:, None]
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)

    def run(self, steps):
        for _ in range(steps):
            self.step += 1
            grad = self.rng.normal(size=self.w.shape).astype("f4") * self.scale * np.float32(1e-3)
            self.m += np.float32(0.1) * (grad - self.m)
            self.v += np.float32(0.01) * (grad**2 - self.v)
            self.w -= np.float32(self.rate) * self.m / (np.sqrt(self.v) + np.float32(1e-8))
        return self.tensors()

    def tensors(self):
        return {
            "a.weight": Array("float32", self.w.copy()),
            "exp_avg/a.weight": Array("float32", self.m.copy()),
            "exp_avg_sq/a.weight": Array("float32", self.v.copy()),
            "a.bias": Array("float32", self.w[0].copy()),
            "step/a.weight": Array("float32", np.float32(self.step)),
        }


def chain_of(path, settings, num=6, every=2, **kwargs):
    training, written = Training(**kwargs), {}
    training.run(10)
    writer = ChainWriter(path, settings)
    for _ in range(num):
        tensors = training.run(every)
        writer.append(training.step, tensors, {"step": training.step})
        written[training.step] = tensors
    return written


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rng, writer = np.random.default_rng(0), ChainWriter(tmp_path, CodecSettings(anchor_every=3))
    written = {step: of_every_dtype(rng) for step in (1, 2, 3, 4)}
    written[3] |= {"new": Array("uint8", np.arange(9, dtype=np.uint8))}  # a tensor that appears
    written[4]["int64"] = Array("int64", rng.integers(-9, 9, (3, 3)))  # another shape than before
    for step, tensors in written.items():
        writer.append(step, tensors)
    for step, state in Chain(tmp_path).walk():
        assert state.tensors.keys() == written[step].keys()
        for name, array in written[step].items():
            assert state.tensors[name].kind == array.kind, name
            assert bits(state.tensors[name]) == bits(array), name


def test_a_training_is_smaller_against_the_checkpoint_before(tmp_path):
    written = chain_of(tmp_path, CodecSettings(anchor_every=4))
    sizes = [file.nbytes for file in Chain(tmp_path).files.values()]
    steps = list(written)
    assert [Chain(tmp_path).header(step)["reference"] is None for step in steps] == [True, *[False] * 3, True, False]
    assert max(sizes[1:4]) < 0.93 * sizes[0]
    for step, state in Chain(tmp_path).walk():
        assert all(bits(state.tensors[name]) == bits(array) for name, array in written[step].items())


def test_one_tensor_is_read_without_the_others(tmp_path, monkeypatch):
    import lcsc.codec.arrays as arrays

    monkeypatch.setattr(arrays, "LENGTH", 100)
    rng, writer = np.random.default_rng(0), ChainWriter(tmp_path, CodecSettings())
    written = {s: {n: Array("float32", rng.normal(size=90).astype("f4")) for n in "abc"} for s in (1, 2, 3)}
    for step, tensors in written.items():
        writer.append(step, tensors)
    path = tmp_path / file_name(3)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in `c`, the last
    path.write_bytes(data)
    chain = Chain(tmp_path)
    assert bits(chain.read(3, ["b"])["b"]) == bits(written[3]["b"])
    with pytest.raises(BankError, match="are not those that were written"):
        chain.read(3, ["c"])
    with pytest.raises(BankError, match="has no tensor `d`"):
        chain.read(2, ["d"])
    with pytest.raises(BankError, match="has the steps 1 to 3 and not 9"):
        chain.read(9)


def damaged_in_many_places(path, places, rng):
    """A file cut off and flipped; each damage with what it was."""
    data = path.read_bytes()
    for at in places:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        yield f"bit at {at}", bytes(flipped)
        yield f"cut at {at}", data[:at]
    yield "longer", data + b"\0"
    yield "another magic", b"x" + data[1:]


def refuses_all_damage(tmp_path, settings, places):
    written = chain_of(tmp_path, settings, num=3, shape=(20, 64))
    steps, rng = list(written), np.random.default_rng(0)
    path = tmp_path / file_name(steps[1])
    good = path.read_bytes()
    for what, data in damaged_in_many_places(path, places(len(good), rng), rng):
        path.write_bytes(data)
        for step in steps[1:]:
            with pytest.raises(BankError, match=file_name(steps[1])):
                pytest.fail(f"{what}: {list(Chain(tmp_path).read(step))} was read")
    path.write_bytes(good)
    assert Chain(tmp_path).read(steps[2])


@pytest.mark.parametrize("settings", [CodecSettings(), LOSSY], ids=["lossless", "lossy"])
def test_damage_is_refused_never_read(tmp_path, settings):
    refuses_all_damage(tmp_path, settings, lambda n, rng: [*range(0, 28), *rng.integers(28, n, 30), n - 1])


@pytest.mark.faults
@pytest.mark.parametrize("settings", [CodecSettings(), LOSSY], ids=["lossless", "lossy"])
def test_damage_is_refused_at_thousands_of_places(tmp_path, settings):
    refuses_all_damage(tmp_path, settings, lambda n, rng: rng.integers(0, n, 1000))


def test_another_reference_is_refused(tmp_path):
    written = chain_of(tmp_path / "a", CodecSettings(), num=3)
    chain_of(tmp_path / "b", CodecSettings(), num=3, seed=1)
    first, second, third = (file_name(step) for step in written)
    (tmp_path / "a" / second).write_bytes((tmp_path / "b" / second).read_bytes())
    with pytest.raises(BankError, match=f"{second}` was coded against `{first}` of other contents"):
        list(Chain(tmp_path / "a").walk())
    (tmp_path / "a" / second).unlink()
    with pytest.raises(BankError, match=f"{third}` needs the checkpoint `{second}`, which does not lie before it"):
        Chain(tmp_path / "a")


def test_a_chain_goes_on_where_it_stopped(tmp_path):
    for settings in (CodecSettings(anchor_every=3), dataclasses.replace(LOSSY, anchor_every=3)):
        whole, parts = tmp_path / settings.mode / "whole", tmp_path / settings.mode / "parts"
        written = chain_of(whole, settings, num=5)
        for step, tensors in written.items():
            ChainWriter(parts, settings).append(step, tensors, {"step": step})
        for step in written:
            assert (whole / file_name(step)).read_bytes() == (parts / file_name(step)).read_bytes()
        with pytest.raises(OutputExistsError, match="cannot follow"):
            ChainWriter(parts, settings).append(min(written), tensors)


# -------------------------------------------------------------------------------------------------------------- lossy


def test_symbols_stand_for_near_numbers_and_errors_do_not_add_up(tmp_path):
    written = chain_of(tmp_path, CodecSettings("lossy", anchor_every=100), num=11)
    steps = list(written)
    errors = []
    for step, state in Chain(tmp_path).walk():
        error = state.tensors["a.weight"].bits - written[step]["a.weight"].bits
        errors.append(float(np.sqrt((error**2).mean())))
        for name in ("a.bias", "step/a.weight"):  # too small to be quantised
            assert bits(state.tensors[name]) == bits(written[step][name])
        v, was = state.tensors["exp_avg_sq/a.weight"].bits, written[step]["exp_avg_sq/a.weight"].bits
        assert (v > 0).all()
        assert np.abs(np.log2(v / was)).mean() < 0.4
    moved = [written[b]["a.weight"].bits - written[a]["a.weight"].bits for a, b in itertools.pairwise(steps)]
    sizes = [float(np.sqrt((x**2).mean())) for x in moved]
    assert errors[0] == 0  # the anchor's weights
    assert max(errors) < 0.25 * min(sizes)
    assert errors[-1] < 1.5 * errors[1]
    assert Chain(tmp_path).files[steps[-1]].nbytes < 0.2 * 3 * 4 * moved[0].size


def test_pruned_numbers_are_those_of_the_rule(tmp_path):
    settings = CodecSettings("lossy", tau=1.0, beta=1.0)
    written = chain_of(tmp_path, settings, num=2)
    first, last = written
    (_, one), (_, two) = Chain(tmp_path).walk()
    before, after = one.tensors["a.weight"].bits, two.tensors["a.weight"].bits
    delta = written[last]["a.weight"].bits - before
    assert np.array_equal(after == before, np.abs(delta) <= np.median(np.abs(delta)))
    m = written[last]["exp_avg/a.weight"].bits
    kept = (np.abs(m) > np.abs(m).mean()) & (after != before)
    assert np.array_equal(two.tensors["exp_avg/a.weight"].bits != 0, kept)
    assert np.array_equal(two.tensors["exp_avg_sq/a.weight"].bits != 0, kept)
    assert first < last


@pytest.mark.parametrize("width", [2, 4, 5, 8])
def test_more_bits_lose_less(tmp_path, width):
    settings = CodecSettings("lossy", bits_w=width, bits_m=width, bits_v=width, layers={"b.*": 32})
    written = chain_of(tmp_path, settings, num=3)
    step = max(written)
    found = Chain(tmp_path).read(step)
    w, was = found["a.weight"].bits, written[step]["a.weight"].bits
    least = {2: 0.3, 4: 0.07, 5: 0.04, 8: 0.007}[width]
    assert np.abs(w - was).mean() < least * np.abs(written[min(written)]["a.weight"].bits - was).mean()


def test_numbers_too_far_apart_for_a_scale_are_kept(tmp_path):
    """Never as Inf or NaN: a second moment of 1e10 among 1e-30, a weight that crosses the whole range."""
    tensors = Training().run(3)
    w, v = (tensors[name].bits for name in ("a.weight", "exp_avg_sq/a.weight"))
    w[0, 0], v[:] = 3e38, 1e-30 * (1 + v / v.max())
    v[0, :3] = 1e10, 3e38, 1e-45
    after = tensors | {"a.weight": Array("float32", np.where(w == w[0, 0], -w, w))}
    writer = ChainWriter(tmp_path, LOSSY)
    for step, own in ((1, tensors), (2, after)):
        writer.append(step, own)
    for (_, state), own in zip(Chain(tmp_path).walk(), (tensors, after), strict=True):
        assert bits(state.tensors["exp_avg_sq/a.weight"]) == bits(own["exp_avg_sq/a.weight"])
        assert bits(state.tensors["a.weight"]) == bits(own["a.weight"])
        assert bits(state.tensors["exp_avg/a.weight"]) != bits(own["exp_avg/a.weight"])


def test_training_that_diverged_is_coded_without_a_word(tmp_path):
    tensors = Training().run(3)
    for name in ("a.weight", "exp_avg/a.weight", "exp_avg_sq/a.weight"):
        tensors[name].bits[0, :3] = np.inf, -np.inf, np.nan
    writer = ChainWriter(tmp_path)
    for step in (1, 2):
        writer.append(step, tensors)
    assert all(bits(state.tensors[n]) == bits(a) for _, state in Chain(tmp_path).walk() for n, a in tensors.items())


def test_a_state_that_is_no_pair_of_moments_is_kept(tmp_path):
    """Differences of squares from a prediction could become negative."""
    training, writer, names = Training(), ChainWriter(tmp_path, LOSSY), ("state/max/a", "exp_avg_sq/b", "exp_avg/b")
    for step in (1, 2, 3):
        tensors = training.run(2)
        tensors |= dict.fromkeys(names[:2], tensors["exp_avg_sq/a.weight"])
        tensors["exp_avg/b"] = Array("float32", tensors["exp_avg/a.weight"].bits.T)
        writer.append(step, tensors)
        read = Chain(tmp_path).read(step)
        assert all(bits(read[name]) == bits(tensors[name]) for name in names)


def test_zero_bits_keep_the_anchor(tmp_path):
    written = chain_of(tmp_path, CodecSettings("lossy", bits_w=0), num=3)
    states = dict(Chain(tmp_path).walk())
    assert all(bits(s.tensors["a.weight"]) == bits(written[min(written)]["a.weight"]) for s in states.values())


def test_what_cannot_be_quantised_is_refused(tmp_path):
    tensors = Training().run(3)
    tensors["exp_avg/a.weight"].bits[3, 4] = np.inf
    with pytest.raises(NonFiniteError, match="`exp_avg/a.weight` of `step-0+1.ckd` holds NaN or Inf"):
        ChainWriter(tmp_path, LOSSY).append(1, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "zip"}, "`codec` is `zip`; it must be one of lossless, lossy"),
        ({"bits_w": 9}, "`bits_w` is 9; it must be 2 to 8, 32 for none of it lost or 0"),
        ({"bits_m": 1}, "`bits_m` is 1; it must be 2 to 8, 32 for none of it lost."),
        ({"layers": {"a*": 12}}, r"`a\*` is 12"),
        ({"anchor_every": 0}, "`anchor_every` is 0; it must be a whole number of at least 1"),
        ({"anchor_every": 1.5}, "`anchor_every` is 1.5; it must be a whole number of at least 1"),
        ({"tau": -1.0}, "`tau` is -1.0; it must lie between 0 and 10"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        CodecSettings(**settings)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"needs `zstandard`.*lcsc\[codec\]"):
        ChainWriter(tmp_path).append(1, {"a": Array("float32", np.arange(50, dtype="f4"))})
