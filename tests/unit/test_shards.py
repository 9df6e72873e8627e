"""A network spread over real processes, filled without gathering, against the whole candidate."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers_ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lcsc.bank import CheckpointBank
from lcsc.bank.dcp_file import read_dcp
from lcsc.bank.extents import read_source
from lcsc.core.errors import BankError, ConfigError, EvaluationError
from lcsc.kernels import Groups
from lcsc.models.network import build_network, save_network
from lcsc.models.shards import LocalShards

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12: torch has threads
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

K, WIDE = 4, 700
COEF = torch.tensor([0.3, -1.1, 2.6, -0.8], dtype=torch.float64)


class Net(nn.Module):
    """Rows that two do not divide, statistics that are copied, and a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, WIDE)
        self.norm = nn.BatchNorm1d(WIDE)
        self.down = nn.Linear(WIDE, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mix(self.down(self.norm(self.up(self.embed(x))))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank")
    for k in range(K):
        torch.manual_seed(k)
        net = Net()
        for tensor in net.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).abs() * 9)
        torch.save(net.state_dict(), path / f"model{k + 1}.pt")
    return path


@pytest.fixture(scope="module")
def wanted(folder):
    """The whole candidate by name; made here, so that the kernels are loaded before the processes part."""
    bank = CheckpointBank.open(folder, storage="resident")
    return {**bank.layout.views(bank.combine(COEF)), **bank.constants}


def check(net, wanted):
    """Every tensor of a spread network, put together by torch, has the bits of the whole candidate."""
    found = net.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, wanted[name].to(whole.dtype)), name


def bytes_read():
    """What this process has asked the system to read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def spread(mesh, **how):
    """A network without numbers whose parameters lie in parts in two processes."""
    with torch.device("meta"):
        net = Net()
    net = fully_shard(net, mesh=mesh, **how).eval().to_empty(device="cpu")
    net.head.weight = net.embed.weight  # to_empty unties
    return net


def fsdp(rank, folder, wanted, to):
    mesh, words = init_device_mesh("cpu", (2,)), torch.arange(11)
    plain = Net().eval()
    plain.load_state_dict(wanted)
    for storage, reshard in (("resident", True), ("streamed", False)):
        net, bank = spread(mesh, reshard_after_forward=reshard), CheckpointBank.open(folder, storage=storage)
        with CommDebugMode() as comm, torch.no_grad():
            shards = LocalShards(bank, net)
            shards.write(torch.eye(K)[0])
        assert comm.get_total_counts() == 0
        with torch.no_grad():
            net(words)  # where FSDP2 keeps what it gathered, it must not use it again
            shards.write(COEF)
            assert torch.equal(net(words), plain(words))
        check(net, wanted)
    net = spread(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    LocalShards(bank, net).write(COEF)
    check(net, wanted)


def half(rank, folder, wanted, to):
    """A process that holds half of the parameters reads half of the bank."""
    net = spread(init_device_mesh("cpu", (2,)))
    bank = CheckpointBank.open(folder, storage="resident")
    shards = LocalShards(bank, net)
    copied = sum(source.nbytes for _, source in bank.constant_sources().values())
    local = sum(tensor.to_local().numel() for tensor in dict.fromkeys(net.parameters()))
    assert 0.49 < local / bank.layout.num_parameters < 0.51
    assert shards.part.num_columns == local
    LocalShards(CheckpointBank.open(folder, storage="resident"), net).write(COEF)  # loads what is loaded once
    before = bytes_read()
    shards.write(COEF)
    # 4 KiB: looking at /proc, and the checksums' second look at what is copied
    assert abs(bytes_read() - before - K * 4 * local - copied) < 4096 + copied
    before = bytes_read()
    shards.write(COEF)
    assert bytes_read() - before < 4096


def placed(rank, folder, wanted, to):
    """Other axes, copies, halves, parts that are empty, and a buffer in parts."""
    mesh = init_device_mesh("cpu", (2,))
    net = Net().to(torch.bfloat16)
    where = {"up.weight": Shard(1), "down.weight": Shard(1), "down.bias": Replicate(), "up.bias": Shard(0)}
    for name, tensor in list(net.named_parameters()):
        module, _, leaf = name.rpartition(".")
        if name in where:
            spread = distribute_tensor(tensor.detach(), mesh, [where[name]])
            setattr(net.get_submodule(module), leaf, nn.Parameter(spread))
    net.norm.running_var = distribute_tensor(net.norm.running_var, mesh, [Shard(0)])
    net.head.weight = net.embed.weight
    shards = LocalShards(CheckpointBank.open(folder, storage="streamed"), net)
    shards.write(COEF)
    check(net, wanted)


def grid(rank, folder, wanted, to):
    """FSDP2 over tensor parallelism: parameters are cut along both axes of a 2 x 2 mesh, one of them twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = Net()
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel(), "mix": ColwiseParallel()})
    net = fully_shard(net, mesh=mesh["dp"])
    assert len(net.up.weight.placements) == 2
    shards = LocalShards(CheckpointBank.open(folder, storage="resident"), net)
    shards.write(COEF)
    check(net, wanted)
    dcp.save(net.state_dict(), checkpoint_id=to)


@pytest.mark.parametrize(("world", "work"), [(2, fsdp), (2, half), (2, placed), (4, grid)])
def test_spread_over_processes(folder, wanted, tmp_path, world, work):
    run_ranks(world, tmp_path, work, folder, wanted, tmp_path / "dcp")
    if work is grid:  # what torch saved of it is the candidate, here and there
        table, files, _ = read_dcp(tmp_path / "dcp")
        assert table.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert read_source(files, table[name]).tobytes() == tensor.numpy().tobytes(), name


def example(rank, world, text):
    os.environ["WORLD_SIZE"] = str(world)
    exec(compile(text, "fill.py", "exec"), {})


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    for step in range(5):
        net = build_network({"class": "GaussianDenoiser", "config": {"shape": [3, 4, 4]}})
        net.mean_CHW.data.normal_()
        save_network(net, tmp_path / "banks" / "large" / f"checkpoint-{step}" / "unet")
    bank = CheckpointBank.open(tmp_path / "banks" / "large")
    bank.load()  # the kernels, before the processes part
    run_ranks(2, tmp_path, example, 2, text)
    table, files, _ = read_dcp(tmp_path / "out" / "dcp")
    wanted = bank.layout.views(bank.combine(torch.full((5,), 0.2, dtype=torch.float64)))
    assert table.keys() == wanted.keys()
    assert all(read_source(files, table[name]).tobytes() == tensor.numpy().tobytes() for name, tensor in wanted.items())


def test_one_process_is_filled_whole(folder, wanted):
    net = Net()
    shards = LocalShards(CheckpointBank.open(folder, storage="delta"), net)
    before = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    bank = shards.bank
    shards.write(COEF)
    check(net, {**bank.layout.views(bank.combine(COEF)), **bank.constants})
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == before
    ends = (0, bank.layout.entries[2].start, bank.layout.num_parameters)
    groups, coef = Groups(ends, (1, 0), 2), torch.stack([COEF, COEF.flip(0)])
    shards.write(coef, groups=groups)
    check(net, {**bank.layout.views(bank.combine(coef, groups=groups)), **bank.constants})
    assert net.head.weight is net.embed.weight


def test_a_network_may_untie_what_the_checkpoints_tie(folder, wanted):
    net = Net()
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    LocalShards(CheckpointBank.open(folder, storage="streamed"), net).write(COEF)
    check(net, wanted)


def unusual(rank, folder):
    net, mesh = Net(), init_device_mesh("cpu", (1,))
    for placement, message in (
        (Partial(), r"`mix.bias` is placed as \(Partial\(sum\),\), which holds sums to be added up"),
        (_StridedShard(0, split_factor=2), r"`mix.bias` is placed as \(.*\), where a process holds several pieces"),
    ):
        net.mix.bias = nn.Parameter(DTensor.from_local(torch.zeros(6), mesh, [placement]))
        with pytest.raises(ConfigError, match=message):
            LocalShards(CheckpointBank.open(folder, storage="streamed"), net)


def test_what_cannot_be_filled_is_refused(folder, tmp_path):
    bank = CheckpointBank.open(folder, storage="streamed")
    net = Net()
    net.mix = nn.Linear(6, 5)
    net.more = nn.Linear(2, 2, bias=False)
    message = r"does not fit `Net`: missing \['more.weight'\], unknown \[\], other shape \['mix.bias', 'mix.weight'\]"
    with pytest.raises(BankError, match=message):
        LocalShards(bank, net)
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ConfigError, match=r"`embed.weight` has no memory yet.*to_empty"):
        LocalShards(bank, net)
    with pytest.raises(
        EvaluationError, match=r"reaches [\d.e+]+, too large for its dtype torch.float16. Keep the network"
    ):
        LocalShards(bank, Net().half()).write(1e6 * COEF)
    run_ranks(1, tmp_path, unusual, folder)
