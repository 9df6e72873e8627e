"""Files as EDM-like trainers leave them: modules that are pickled together with the source of their classes."""

from __future__ import annotations

import importlib
import sys

import pytest

#: A stand-in for the `torch_utils.persistence` of EDM and its relatives, in our own words: an instance is pickled as a
#: call of `_reconstruct_persistent_obj` with its state and the source text of its module, which the call executes.
PERSISTENCE = """
import inspect
import sys
import types


def persistent_class(base):
    text = inspect.getsource(sys.modules[base.__module__])

    class Saved(base):
        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": text, "class_name": base.__name__}
            return _reconstruct_persistent_obj, ({**meta, "state": dict(self.__dict__)},), None

    Saved.__name__ = Saved.__qualname__ = base.__name__
    Saved.__module__ = base.__module__
    return Saved


def _reconstruct_persistent_obj(meta):
    module = types.ModuleType("from_a_pickle")
    sys.modules["from_a_pickle"] = module
    exec(meta["module_src"], module.__dict__)
    made = getattr(module, meta["class_name"]).__new__(getattr(module, meta["class_name"]))
    made.__dict__.update(meta["state"])
    return made
"""

#: Networks of such a trainer; `CANARY` is replaced by a path that the source writes to when it is executed.
NETWORKS = """
import pathlib

import torch
from torch_utils import persistence

pathlib.Path(CANARY).write_text("the source was executed")


class Settings(dict):
    pass


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)


@persistence.persistent_class
class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, 3, 2, 2))
        self.bias = None
        self.register_parameter("absent", None)
        self.register_buffer("filter", torch.randn(4, 2).t())
        self.register_buffer("scratch", torch.randn(7), persistent=False)
        self.inner = Plain()
        self.act = torch.nn.SiLU()


@persistence.persistent_class
class Precond(torch.nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.settings = Settings(width=width)
        self.blocks = torch.nn.ModuleDict({f"{n}x{n}_block": Block(width) for n in (8, 16)})
        self.blocks["8x8_block"].tied = self.blocks["16x16_block"].weight
        self.scale = torch.nn.Parameter(torch.randn(()))
        self.empty = torch.nn.Parameter(torch.randn(0, 3))
        self.logvar = torch.nn.Linear(4, 2)
        self.numbers = torch.nn.Parameter(torch.randn(12).as_strided((2, 3), (6, 2), 1))
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)


@persistence.persistent_class
class Augment:
    def __init__(self):
        self.rates = torch.linspace(0, 1, 3).tolist()
"""


@pytest.fixture
def edm(tmp_path, monkeypatch):
    """The stand-in modules `torch_utils.persistence` and `networks`, imported; their folder and the canary's path."""
    folder, canary = tmp_path / "edm code", tmp_path / "canary"
    (folder / "torch_utils").mkdir(parents=True)
    (folder / "torch_utils" / "__init__.py").touch()
    (folder / "torch_utils" / "persistence.py").write_text(PERSISTENCE)
    (folder / "networks.py").write_text(NETWORKS.replace("CANARY", repr(str(canary))))
    monkeypatch.syspath_prepend(folder)
    networks = importlib.import_module("networks")
    canary.unlink()
    networks.folder, networks.canary = folder, canary
    yield networks
    for name in ("networks", "torch_utils", "torch_utils.persistence", "from_a_pickle"):
        sys.modules.pop(name, None)
