"""Symbols coded by a network: exact, small, the same bytes each time, and refused where the arithmetic is another."""

import platform

import numpy as np
import pytest
import torch

from lcsc.codec import lossy, neural
from lcsc.codec.arrays import Array
from lcsc.codec.chain import Chain, ChainWriter, file_name
from lcsc.codec.coders import Wrong
from lcsc.codec.container import Container, Stream, pack
from lcsc.codec.settings import CodecSettings
from lcsc.core.errors import BankError, ConfigError
from lcsc.kernels import neural as kernel

NEURAL = CodecSettings("lossy", anchor_every=3, coder="neural")
SHAPES = [(20, 30), (7,), (3, 4, 5)]
SIZE = 20 * 30 + 7 + 60


def planes_of(bits, seed=0):
    """Symbols of a plane whose rows differ in size, and others that tell of it."""
    rng = np.random.default_rng(seed)
    most = (1 << bits) - 1
    mean = np.repeat(np.linspace(0.1, 0.9, SIZE // 11 + 1), 11)[:SIZE]
    own = np.clip(rng.normal(mean * most, most / 8), 0, most).astype(np.uint8)
    near = np.clip(own.astype(int) + rng.integers(-1, 2, SIZE), 0, most) >> max(0, bits - 4)
    return own, {"w-": near.astype(np.uint8), "m-": near.astype(np.uint8), "w": near.astype(np.uint8)}


@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("plane", ["w", "m", "v"])
def test_symbols_come_back_and_what_was_learned_goes_on(plane, bits):
    own, known = planes_of(bits)
    before, other = None, None
    for seed in (0, 1):
        own, known = planes_of(bits, seed)
        params, streams, before = neural.encode_plane(plane, own, bits, known, before, SHAPES)
        assert params == [bits, seed, neural.MODEL]
        rows = [((stream.coder, stream.params), stream.data) for stream in streams]
        again, other = neural.decode_plane(plane, params, rows, SIZE, known, other, SHAPES)
        assert again.dtype == np.uint8
        assert np.array_equal(again, own)
    # another number of bits begins anew, as counts would
    own, known = planes_of(3)
    assert neural.encode_plane(plane, own, 3, known, before, SHAPES)[0] == [3, 0, neural.MODEL]


def written(path, settings=NEURAL, num=4):
    """A chain of tensors of several dtypes, float32 ones with moments, and what went in."""
    rng, found = np.random.default_rng(0), {}
    w, scale = rng.normal(size=(24, 64)).astype("f4"), np.exp(rng.normal(size=(24, 1))).astype("f4")
    writer = ChainWriter(path, settings)
    for step in range(1, num + 1):
        m = (rng.normal(size=w.shape) * scale).astype("f4")
        w = w + np.float32(0.01) * m
        found[step] = {
            "a": Array("float32", w),
            "exp_avg/a": Array("float32", m),
            "exp_avg_sq/a": Array("float32", m * m),
            "half": Array("float16", rng.normal(size=9).astype("f2")),
            "count": Array("int64", np.array(step)),
        }
        writer.append(step, found[step])
    return found


def contents(path):
    return {step: {n: a.bits.tobytes() for n, a in state.tensors.items()} for step, state in Chain(path).walk()}


def test_a_chain_gives_what_counts_give_and_the_same_bytes_each_time(tmp_path):
    given = written(tmp_path / "neural")
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    torch.set_num_threads(2)
    written(tmp_path / "again")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.initial_seed() == seed
    written(tmp_path / "counts", CodecSettings("lossy", anchor_every=3))
    assert contents(tmp_path / "neural") == contents(tmp_path / "counts")
    for step, tensors in given.items():
        one, two, counts = (tmp_path / kind / file_name(step) for kind in ("neural", "again", "counts"))
        assert one.read_bytes() == two.read_bytes()
        header = Container(one).header
        assert header["environment"] == neural.environment()
        assert "environment" not in Container(counts).header
        state = Chain(tmp_path / "neural").read(step)
        assert all(state[name].bits.tobytes() == tensors[name].bits.tobytes() for name in ("half", "count"))
    assert ChainWriter(tmp_path / "neural", NEURAL).append(9, given[4]).is_file()  # goes on from what it reads
    assert Chain(tmp_path / "neural").read(9).keys() == given[4].keys()


def test_rows_that_differ_in_size_take_less_than_with_counts():
    rng = np.random.default_rng(0)
    own = np.clip(rng.normal(8, np.repeat(rng.uniform(0.3, 4, 160), 100)), 0, 15).astype(np.uint8)
    sizes = [
        sum(len(stream.data) for stream in neural.encode_plane("w", own, 4, {}, None, [(160, 100)])[1]),
        sum(len(stream.data) for stream in lossy.encode_plane("w", own, 4, {}, None)[1]),
    ]
    assert sizes[0] < 0.95 * sizes[1]


def test_a_chain_may_change_its_coder(tmp_path):
    given = written(tmp_path, num=2)
    ChainWriter(tmp_path, CodecSettings("lossy")).append(3, given[2])
    ChainWriter(tmp_path, NEURAL).append(4, given[1])
    ways = [{part[3] for part in Chain(tmp_path).header(step)["parts"] if part[1] == "v"} for step in (2, 3)]
    assert ways == [{"neural"}, {"symbols"}]
    assert len(contents(tmp_path)) == 4


def test_damage_is_refused(tmp_path):
    written(tmp_path, num=3)
    file = tmp_path / file_name(2)
    good = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 15):
        flipped = bytearray(good)
        flipped[at] ^= 4
        for data in (bytes(flipped), good[:at]):
            file.write_bytes(data)
            with pytest.raises(BankError, match=f"`{file}` is no whole coded checkpoint"):
                Chain(tmp_path).read(2)


def repacked(file, change):
    """Another header with checksums that fit: nothing is wrong but what it says."""
    container = Container(file)
    rows = [row for part in container.header["parts"] for row in part[5]]
    streams = [Stream(c, p, container.read(*place)) for c, p, *place in container.places(rows)]
    change(container.header)
    file.write_bytes(pack(container.header, streams))


def test_another_arithmetic_is_refused_and_says_what_differs(tmp_path):
    written(tmp_path)
    file = tmp_path / file_name(1)
    repacked(file, lambda header: header["environment"].update(arithmetic="0" * 32, processor="z80", numba="0.1"))
    with pytest.raises(BankError) as error:
        Chain(tmp_path).read(1)
    here = neural.environment()
    assert str(error.value) == (
        f"`{file}` was coded by a network (coder=neural) that does not compute here what it did where it was written: "
        f"arithmetic {'0' * 32} there, {here['arithmetic']} here; processor z80 there, {here['processor']} here; "
        f"numba 0.1 there, {here['numba']} here. Read it there, or pack the bank there again with coder=counts, which "
        "is read everywhere."
    )
    repacked(file, lambda header: header.pop("environment"))
    with pytest.raises(BankError, match="that does not compute here"):
        Chain(tmp_path).read(1)


def test_an_arithmetic_that_looks_the_same_gives_no_wrong_numbers(tmp_path, monkeypatch):
    written(tmp_path, num=2)
    same, fresh = neural.environment()["arithmetic"], kernel.fresh_net

    def other(contexts):
        net = fresh(contexts)
        net.table_RH[:] = np.nextafter(net.table_RH, np.float32(1))  # one place in the last digit
        return net

    monkeypatch.setattr(kernel, "fresh_net", other)
    assert neural._arithmetic.__wrapped__() != same
    with pytest.raises(BankError, match="where it was written: the environments look the same. Read it there"):
        Chain(tmp_path).read(1)


@pytest.mark.parametrize("what", ["a symbol", "a network"])
def test_a_stream_that_does_not_come_back_is_not_written(tmp_path, monkeypatch, what):
    decode = kernel.decode

    def faulty(data, known_PN, ends_E, columns_E, contexts, net):
        found = decode(data, known_PN, ends_E, columns_E, contexts, net)
        if what == "a symbol":
            found[77] ^= 1
        else:
            net.bias_S[0] = np.nextafter(net.bias_S[0], np.float32(1))
        return found

    monkeypatch.setattr(kernel, "decode", faulty)
    with pytest.raises(
        BankError, match="1536 symbols of plane m did not come back from the stream .* Use coder=counts"
    ):
        written(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compilers for other processors may fuse operations")
def test_files_of_other_machines_can_be_read():
    """A change of what the network computes needs another MODEL, and files of the old one are lost."""
    assert (neural.MODEL, neural._arithmetic()) == (1, "79502e8c3a0134e6a58478930943fe9e")


def test_the_interpreter_computes_the_same(monkeypatch):
    """float32 rounded at each step, in the order of the source: what numba compiles is nothing else."""
    own, known = planes_of(4)
    place = neural._Place([(9, 8)], 72)
    known = {name: symbols[:72] for name, symbols in known.items()}

    def coded():
        (net,) = neural._nets("w", 4, None)
        return kernel.encode(own[:72].copy(), *place.arguments(known, ("w", 16), net)), net

    data, net = coded()
    for name in ("_exp", "_find", "_ask_counts", "_predict", "_descend", "_learn", "_count", "_walk"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name).py_func)
    with np.errstate(over="ignore"):
        again, other = coded()
    assert again == data
    assert all(np.array_equal(a, b) for a, b in zip(net, other, strict=True))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ([4, 0, neural.MODEL + 1], f"of the network {neural.MODEL + 1}, and this lcsc has {neural.MODEL}"),
        ([9, 0, neural.MODEL], "symbols are coded as"),
        ([5, 0, neural.MODEL], "symbols are coded as"),
        ([4, 1, neural.MODEL], "a network that the checkpoint before does not have"),
    ],
)
def test_other_settings_are_refused(params, said):
    with pytest.raises(Wrong, match=said):
        neural.decode_plane("v", params, [(("neural", []), b"abc")], SIZE, {}, None, SHAPES)
    with pytest.raises(Wrong, match=f"{SIZE + 1} symbols are of tensors of {SIZE} numbers"):
        neural.decode_plane("v", [4, 0, neural.MODEL], [(("neural", []), b"abc")], SIZE + 1, {}, None, SHAPES)


def test_coders_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="`coder` is `lstm`; it must be one of counts, neural"):
        CodecSettings("lossy", coder="lstm")
    with pytest.raises(ConfigError, match="`coder` is `neural` and `codec` is `lossless`, which makes no symbols"):
        CodecSettings(coder="neural")
