"""Files <-> tensors."""

from lcsc.bank.bank import CheckpointBank, Selection
from lcsc.bank.layout import Layout

__all__ = ["CheckpointBank", "Layout", "Selection"]
