"""What the tests of layouts share: a small network, and the comparison with what the real library loads back."""

from __future__ import annotations

import torch
from torch import nn

from lcsc.bank.extents import read_source

STEPS = (50, 100, 1000)


class Net(nn.Module):
    """Floats, batch-norm statistics and an integer buffer: what real networks have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def net(seed):
    """A `Net` with numbers of its own."""
    torch.manual_seed(seed)
    made = Net()
    made.body[1].running_mean.normal_()
    made.body[1].num_batches_tracked.fill_(seed)
    return made


def assert_same(item, expected):
    """A checkpoint's table must give exactly these tensors: names, dtypes, shapes and bits."""
    assert set(item.table) == set(expected)
    for name, tensor in expected.items():
        source = item.table[name]
        assert source.dtype == str(tensor.dtype).removeprefix("torch."), name
        assert source.shape == tuple(tensor.shape), name
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert read_source(item.files, source).tobytes() == bits.numpy().tobytes(), name


def said(group, text):
    """Whether one of the notes of a group contains a text."""
    return any(text in note for note in group.notes)


def by_label(groups):
    """Groups by label."""
    return {group.label: group for group in groups}
