"""Images from a parquet file, as dataset hubs keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lcsc.core.errors import ConfigError, MissingExtraError, did_you_mean
from lcsc.core.registry import register
from lcsc.datasets.files import FileDataset
from lcsc.datasets.images import decode, existing


@register("dataset", "parquet", source="Apache Parquet, Hugging Face image layout")
@dataclass(frozen=True)
class Parquet(FileDataset):
    """One column of encoded images (PNG, JPEG, ...), one image a row. Needs pyarrow.

    Args:
        path: the file.
        column: dotted name of the column of bytes; `img.bytes` is the field `bytes` of the struct `img`.
        resize: side of the square images to make (centre crop, antialiased), or None if all have one size.
    """

    column: str = "img.bytes"

    kind: ClassVar[str] = "parquet"

    def read(self) -> Tensor:
        """All images, shape (N, C, H, W), float32 in [-1, 1].

        Raises:
            MissingExtraError: pyarrow is not installed.
            ConfigError: no such file or column, not parquet, an unreadable image, sizes that differ without `resize`.
        """
        path = existing(self.path, "parquet")
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError(
                "dataset `parquet` needs `pyarrow`; install it with `pip install lcsc[parquet]`."
            ) from error
        try:
            with pq.ParquetFile(path) as file:
                columns = [file.schema.column(i).path for i in range(len(file.schema))]
                if self.column not in columns:
                    raise ConfigError(f"`{path}` has no column `{self.column}`.{did_you_mean(self.column, columns)}")
                table = file.read(columns=[self.column])
        except pa.ArrowInvalid as error:
            raise ConfigError(f"cannot read `{path}` as parquet: {error}.") from error
        while any(pa.types.is_struct(field.type) for field in table.schema):
            table = table.flatten()
        rows = table.column(self.column).to_pylist()
        for i, row in enumerate(rows):
            if not isinstance(row, bytes):
                raise ConfigError(
                    f"row {i} of column `{self.column}` in `{path}` is {type(row).__name__}, not bytes. "
                    "Name a column of encoded images in `dataset.column`."
                )
        return decode(((f"{path}, row {i}", row) for i, row in enumerate(rows)), self.resize, "parquet")
