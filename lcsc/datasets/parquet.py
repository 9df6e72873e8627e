"""Images from a parquet file, as dataset hubs keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from lcsc.core.errors import ConfigError, not_installed
from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import decode, existing
from lcsc.datasets.labels import AUTO, choose_images, choose_labels, class_numbers


@register("dataset", "parquet", source="Apache Parquet, Hugging Face image layout")
@dataclass(frozen=True)
class Parquet(FileDataset):
    """One column of encoded images (PNG, JPEG, ...), one image a row, with labels if it has some. Needs pyarrow.

    Args:
        path: the file.
        resize: side of the square images to make (centre crop, antialiased), or None if all have one size.
        column: dotted name of the column of bytes; `img.bytes` is the field `bytes` of the struct `img`; `auto` takes
            the only column of bytes.
        label_column: dotted name of the column of labels; `auto` takes the one with a usual name, None reads none.
    """

    column: str = AUTO
    label_column: str | None = AUTO

    kind: ClassVar[str] = "parquet"

    def read(self) -> tuple[Tensor, Tensor | None]:
        """All images, shape (N, C, H, W), float32 in [-1, 1], and their classes, shape (N,), int64, or None.

        Raises:
            MissingExtraError: pyarrow is not installed.
            ConfigError: no such file or column, not parquet, an unreadable image, sizes that differ without `resize`,
                or labels that are missing or neither whole numbers nor texts.
        """
        path = existing(self.path, "parquet")
        column, label_column, columns = self._columns(path)
        rows = columns[column]
        for i, row in enumerate(rows):
            if not isinstance(row, bytes):
                raise ConfigError(
                    f"row {i} of column `{column}` in `{path}` is {type(row).__name__}, not bytes. "
                    "Name a column of encoded images in `dataset.column`."
                )
        images_NCHW = decode(((f"{path}, row {i}", row) for i, row in enumerate(rows)), self.resize, "parquet")
        if label_column is None:
            return images_NCHW, None
        where = f"column `{label_column}` of `{path}`"
        return images_NCHW, class_numbers(np.array(columns[label_column]), len(rows), where)

    def _columns(self, path: Any) -> tuple[str, str | None, dict[str, list[Any]]]:
        """Names of the two columns, and their values by name."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise not_installed("dataset `parquet`", "pyarrow", "parquet") from error
        try:
            with pq.ParquetFile(path) as file:
                names = [file.schema.column(i).path for i in range(len(file.schema))]
                types = _flat(pa, file.schema_arrow.empty_table()).schema
                fitting = [f.name for f in types if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
                where = f"`{path}`"
                column = choose_images(self.column, names, fitting, what="column", setting="column", where=where)
                rest = [name for name in names if name != column]
                label_column = choose_labels(
                    self.label_column, rest, what="column", setting="label_column", where=where
                )
                wanted = [column, *([] if label_column is None else [label_column])]
                table = _flat(pa, file.read(columns=wanted))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"cannot read `{path}` as parquet: {error}.") from error
        return column, label_column, {name: table.column(name).to_pylist() for name in wanted}


def _flat(pa: Any, table: Any) -> Any:
    """The table with the fields of structs as columns of their own, by dotted names."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table
