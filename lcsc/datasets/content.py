"""Digests of what a data set holds, so that other images under an old name are noticed."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from lcsc.datasets.base import Dataset, TextDataset, TextPart


def images_digest(images_NCHW: Tensor) -> str:
    """Hex SHA-256 of the shape and the float32 values."""
    return _digest(images_NCHW, "<f4")


def data_digest(dataset: Dataset) -> str:
    """Hex SHA-256 of all images and labels; reads them, which takes about a second for a gigabyte.

    Raises:
        ConfigError: the data set cannot be read.
    """
    labels_N = dataset.labels()
    parts = [images_digest(dataset.images()), "" if labels_N is None else _digest(labels_N, "<i8")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def text_digest(dataset: TextDataset) -> str:
    """Hex SHA-256 of all parts of a text, in the integers they are kept in.

    Raises:
        ConfigError: the text cannot be read.
    """
    tokens = [dataset.tokens(part) for part in TextPart]
    parts = [_digest(part, part.numpy().dtype.newbyteorder("<").str) for part in tokens]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _digest(tensor: Tensor, dtype: str) -> str:
    array = np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=dtype)
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(array.data)
    return digest.hexdigest()
