"""lcsc turns the checkpoints a training run already saved into a better model.

    bank = lcsc.CheckpointBank.open("banks/digits")
    run = lcsc.open_run("runs/digits-...")

Names are imported when they are first used: `import lcsc` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> where it lives
_HOMES = {
    "BankPart": "lcsc.bank.part:BankPart",
    "Budget": "lcsc.search.budget:Budget",
    "CheckpointBank": "lcsc.bank:CheckpointBank",
    "LcscError": "lcsc.core.errors:LcscError",
    "LocalShards": "lcsc.models.shards:LocalShards",
    "Problem": "lcsc.search.problem:Problem",
    "SampleQuality": "lcsc.objectives.sample_quality:SampleQuality",
    "Selection": "lcsc.bank:Selection",
    "build": "lcsc.core.registry:build",
    "build_problem": "lcsc.search.setup:build_problem",
    "combine": "lcsc.kernels:combine",
    "compose_config": "lcsc.config.hydra_app:compose_config",
    "open_run": "lcsc.report.run:open_run",
    "project": "lcsc.kernels:project",
    "register": "lcsc.core.registry:register",
    "run_search": "lcsc.search.run:run_search",
    "save_dcp": "lcsc.export.dcp:save_dcp",
    "write_report": "lcsc.report.html:write_report",
}
__all__ = [
    "__version__",
    "BankPart",
    "Budget",
    "CheckpointBank",
    "LcscError",
    "LocalShards",
    "Problem",
    "SampleQuality",
    "Selection",
    "build",
    "build_problem",
    "combine",
    "compose_config",
    "open_run",
    "project",
    "register",
    "run_search",
    "save_dcp",
    "write_report",
]

if TYPE_CHECKING:
    from lcsc.bank import CheckpointBank, Selection
    from lcsc.bank.part import BankPart
    from lcsc.config.hydra_app import compose_config
    from lcsc.core.errors import LcscError
    from lcsc.core.registry import build, register
    from lcsc.export.dcp import save_dcp
    from lcsc.kernels import combine, project
    from lcsc.models.shards import LocalShards
    from lcsc.objectives.sample_quality import SampleQuality
    from lcsc.report.html import write_report
    from lcsc.report.run import open_run
    from lcsc.search.budget import Budget
    from lcsc.search.problem import Problem
    from lcsc.search.run import run_search
    from lcsc.search.setup import build_problem


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `lcsc` has no attribute `{name}`")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
