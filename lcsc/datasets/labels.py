"""Which array or column holds the images and which the labels, and labels as class numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lcsc.core.errors import ConfigError, did_you_mean

#: The setting that means: find it where there is no doubt. Null means: there are none.
AUTO = "auto"
#: Names that labels go by; another name has to be given.
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "classes", "y")


def choose_images(
    wanted: str, names: Sequence[str], fitting: Sequence[str], *, what: str, setting: str, where: str
) -> str:
    """The name of the images: `wanted`, or with `auto` the only one of `fitting`.

    Args:
        wanted: the setting's value.
        names: all names there are.
        fitting: those that could be images, by shape or type.
        what: `array` or `column`, for messages, as are the next two.
        setting: the setting's name.
        where: what holds them.

    Raises:
        ConfigError: no such name, or none or several fit.
    """
    if wanted != AUTO:
        if wanted not in names:
            raise ConfigError(f"{where} has no {what} `{wanted}`.{did_you_mean(wanted, names)}")
        return wanted
    if len(fitting) != 1:
        found = f"several {what}s that could be images: {', '.join(fitting)}" if fitting else f"no {what} of images"
        raise ConfigError(f"{where} has {found}. Name one of {', '.join(names) or 'none'} in `dataset.{setting}`.")
    return fitting[0]


def choose_labels(wanted: str | None, names: Sequence[str], *, what: str, setting: str, where: str) -> str | None:
    """The name of the labels: `wanted`, with `auto` the only usual name there is, or None.

    A name may be dotted; its last word counts.

    Raises:
        ConfigError: no such name, or several usual names.
    """
    if wanted is None:
        return None
    if wanted != AUTO:
        if wanted not in names:
            raise ConfigError(f"{where} has no {what} `{wanted}`.{did_you_mean(wanted, names)}")
        return wanted
    usual = [name for name in names if name.rpartition(".")[2].lower() in LABEL_NAMES]
    if len(usual) > 1:
        raise ConfigError(
            f"{where} has several {what}s that could be labels: {', '.join(usual)}. "
            f"Name one in `dataset.{setting}`, or set it to null to read none."
        )
    return usual[0] if usual else None


def class_numbers(values_N: np.ndarray, num_images: int, where: str) -> Tensor:
    """Labels as int64, shape (N,): whole numbers as they are, texts by their rank in sorted order.

    Raises:
        ConfigError: not one label for each image, or labels that are neither whole numbers nor texts.
    """
    if values_N.shape != (num_images,):
        raise ConfigError(
            f"{where} has shape {values_N.shape} for {num_images} images; labels are one number for each image. "
            "Name another, or set it to null to read none."
        )
    if np.issubdtype(values_N.dtype, np.integer) or values_N.dtype == np.bool_:
        return torch.from_numpy(values_N.astype(np.int64))
    if values_N.dtype.kind == "U":
        return torch.from_numpy(np.unique(values_N, return_inverse=True)[1].astype(np.int64))
    raise ConfigError(
        f"{where} holds {values_N.dtype}; labels are whole numbers or texts. Name another, or set it to null."
    )
