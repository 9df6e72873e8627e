"""What a bank looks like before a number is read: rows, columns, ties, and what is copied instead of combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcsc.bank.extents import FLOATS, Source, Table
from lcsc.bank.find import Checkpoint, Group
from lcsc.bank.keys import agree, check_filled
from lcsc.bank.layout import Layout, is_combined, is_refused
from lcsc.bank.rows import Row
from lcsc.bank.shard_index import shown
from lcsc.core.errors import BankError


@dataclass(frozen=True)
class Shape:
    """Rows and columns of a bank.

    Args:
        rows: checkpoints in step order.
        layout: combined tensors.
        constants: names of the tensors that are copied from the last checkpoint.
        arch: the network, None when the files do not say.
        kind: raw, ema or lora.
        rate: rate of the EMA as written, None for others and where rows have several.
        notes: what the user should know about how the files were read.
        rates: EMA rate of each row where rows have several, else empty.
        parents: origin of each row where the file itself says so (packed and coded banks), else None.
        held: what keeps the rows' files where they lie, while anybody uses them.
    """

    rows: tuple[Row, ...]
    layout: Layout
    constants: tuple[str, ...]
    arch: Mapping[str, Any] | None
    kind: str
    rate: str | None
    notes: tuple[str, ...]
    rates: tuple[str, ...] = ()
    parents: tuple[Mapping[str, Any], ...] | None = None
    held: object | None = None

    @property
    def row_rates(self) -> tuple[str | None, ...]:
        """EMA rate of each row as written, None for others."""
        return self.rates or (self.rate,) * len(self.rows)

    @property
    def copied(self) -> str | None:
        """Which tensors are copied and from which step, without a full stop; None where all are combined."""
        return copied_text(self.constants, self.rows[-1].step)

    @property
    def said(self) -> tuple[str, ...]:
        """All that a user should know: the notes, and what is copied."""
        return self.notes if self.copied is None else (*self.notes, self.copied)


def copied_text(names: Sequence[str], step: int) -> str | None:
    """That these tensors are copied from a step, without a full stop; None where there are none."""
    if not names:
        return None
    name = next((name for name in names if name.endswith("running_var")), names[0])
    what = f"tensors (such as `{shown(name)}`) are" if len(names) > 1 else f"tensor (`{shown(name)}`) is"
    return f"{len(names)} {what} copied from step {step}, not averaged"


def shape_of(group: Group, checkpoints: Sequence[Checkpoint]) -> Shape:
    """The bank that some checkpoints of a group make.

    Raises:
        BankError: names, shapes or configurations differ (the first ten differences are named), a checkpoint lacks an
            EMA that others have, or a tensor has a dtype that cannot be combined.
    """
    tables = agree(checkpoints)
    check_filled(checkpoints, [*group.checkpoints, *checkpoints])
    rates = tuple(str(item.rate) for item in checkpoints)
    several = len(set(rates)) > 1
    rows = tuple(Row(c.step, c.path, c.files, t, stored=c.stored) for c, t in zip(checkpoints, tables, strict=True))
    _check_arch(checkpoints)
    different = list({id(table): table for table in tables}.values())
    _check_dtypes(checkpoints, tables)
    combined = {name: {is_combined(name, table[name].dtype) for table in different} for name in tables[0]}
    if mixed := [name for name, kinds in combined.items() if len(kinds) > 1]:
        raise BankError(f"`{mixed[0]}` holds floats in some checkpoints and integers in others. Save them alike.")
    names = [name for name, kinds in combined.items() if True in kinds]
    ties = _ties(different, names)
    shapes = {name: tables[0][name].shape for name in names if name not in ties}
    if not shapes:
        raise BankError(f"`{checkpoints[0].path}` holds no float tensor that could be combined.")
    return Shape(
        rows=rows,
        layout=Layout.of(shapes, ties),
        constants=tuple(sorted(set(tables[0]) - set(names))),
        arch=checkpoints[-1].arch,
        kind=group.kind,
        rate=None if several else group.rate,
        notes=group.notes,
        rates=rates if several else (),
    )


def several_emas(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The EMAs of one network, a group for each rate.

    Raises:
        BankError: fewer than two EMA rates, or EMAs of several networks.
    """
    emas = [group for group in groups if group.kind == "ema" and group.rate]
    networks = {group.component for group in emas}
    if len(networks) > 1:
        said = ", ".join(f"`bank.component={name}`" for name in sorted(map(str, networks)))
        raise BankError(f"the checkpoints hold EMAs of several networks. Choose one: {said}.")
    if len(emas) < 2:
        raise BankError(f"`bank.weights=ema:*` takes EMAs of several rates, and there are {len(emas)}. Leave it out.")
    return tuple(emas)


def _ties(tables: Sequence[Table], names: Sequence[str]) -> dict[str, str]:
    """Name -> twin, for tensors that are the same bytes in every checkpoint; the first name in order is the twin."""
    twins: list[dict[str, str]] = []
    for table in tables:
        first: dict[Source, str] = {}
        twins.append({n: first.setdefault(table[n], n) for n in sorted(names) if table[n].numel})
    return {n: t for n, t in twins[0].items() if n != t and all(other.get(n) == t for other in twins)}


def _check_dtypes(checkpoints: Sequence[Checkpoint], tables: Sequence[Table]) -> None:
    checked: set[int] = set()
    for item, table in zip(checkpoints, tables, strict=True):
        odd = [] if id(table) in checked else [name for name, s in table.items() if is_refused(name, s.dtype)]
        checked.add(id(table))
        if odd:
            more = f" and {len(odd) - 1} other{'s' * (len(odd) > 2)}" if len(odd) > 1 else ""
            raise BankError(
                f"`{shown(item.path)}` holds `{shown(odd[0])}`{more} in {table[odd[0]].dtype}; only weights in "
                f"{', '.join(FLOATS)} are combined. Save them as one of these (quantized weights before they are "
                "quantized), or leave such a buffer out of the state dict."
            )


def _check_arch(files: Sequence[Checkpoint]) -> None:
    for file in files[1:]:
        if file.arch != files[0].arch:
            raise BankError(
                f"`{files[0].path / 'config.json'}` and `{file.path / 'config.json'}` describe different networks. "
                "A bank holds one architecture; choose its steps with `bank.start` and `bank.stop`."
            )
