"""Train the detector `classifier` on your own labelled images: python scripts/train_detector.py dataset=... to=FILE

    python scripts/train_detector.py dataset=npz dataset.path=mnist.npz dataset.resize=16 to=mnist.safetensors
    python scripts/train_detector.py dataset=parquet dataset.path=train.parquet flip=true to=cifar.safetensors

A small residual CNN learns the classes; its last features are what `fid_classifier` and `kid_classifier` compare. The
accuracy on held-out images is printed and stored in the file's header. Words, with their defaults:

    to             file to write; nothing is overwritten
    dataset        a data set with labels and square images of 8 pixels or more, and its settings as `dataset.KEY=...`
    seed=0         of the weights, the batches and the held-out images
    num_steps=1500 batch_size=128 learning_rate=0.002 (the peak; it warms up and falls to 0)
    widths=32,64,128  channels of the stages, the side is halved in between
    num_features=64   D, the features that are compared
    held_out=0.1      share of the images, of every class, that is not trained on
    shift=2 noise=0.1 flip=false  pixels, standard deviation and mirroring that training images are varied by
    device=auto       torch device; `auto` takes the GPU where there is one

The same words give the same file on the same machine with the same number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # wanted by deterministic algorithms, read at the start

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcsc.cli.settings import need, parse_words
from lcsc.config.hydra_app import compose_config
from lcsc.core import registry
from lcsc.core.errors import ConfigError, LcscError, OutputExistsError
from lcsc.core.files import write_bytes
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.base import Dataset
from lcsc.metrics.classifier import ClassifierArch, ClassifierNet, pack_classifier
from lcsc.training.folder import images_digest


@dataclass(frozen=True)
class Training:
    """How the classifier is trained; see the top of this file."""

    seed: int = 0
    num_steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    widths: tuple[int, ...] = (32, 64, 128)
    num_features: int = 64
    held_out: float = 0.1
    shift: int = 2
    noise: float = 0.1
    flip: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size - 1) < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"`num_steps`, `batch_size`, `learning_rate` are {self.num_steps}, {self.batch_size}, "
                f"{self.learning_rate}; give at least 1, at least 2 and a number above 0."
            )
        if not 0 < self.held_out < 1 or self.shift < 0 or self.noise < 0:
            raise ConfigError(
                f"`held_out`, `shift`, `noise` are {self.held_out}, {self.shift}, {self.noise}; the first lies "
                "between 0 and 1, the others are 0 or above."
            )

    @classmethod
    def read(cls, texts: dict[str, str | None]) -> Training:
        """From the words of the command line; raises ConfigError for text that is no value of the setting's type."""
        values = {}
        for field in fields(cls):
            text = texts[field.name]
            if text is not None:
                values[field.name] = _value(field.name, text, type(field.default))
        return cls(**values)


def _value(name: str, text: str, kind: type) -> object:
    try:
        if kind is tuple:
            return tuple(int(part) for part in text.split(","))
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        wanted = {tuple: "whole numbers with commas", bool: "true or false", int: "a whole number", float: "a number"}
        raise ConfigError(f"`{name}` is `{text}`; give {wanted[kind]}.") from error


def held_out_rows(labels_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint row numbers (to train on, held out); every class is held out at the same share, rounded up."""
    order_N = SeedRange(seed, Purpose.SPLIT).generator().permutation(len(labels_N))
    held = [
        rows[: int(np.ceil(share * len(rows)))]
        for rows in (order_N[labels_N.numpy()[order_N] == label] for label in labels_N.unique().tolist())
    ]
    held_M = np.sort(np.concatenate(held))
    return torch.from_numpy(np.setdiff1d(order_N, held_M)), torch.from_numpy(held_M)


def varied(images_NCHW: Tensor, how: Training, generator: torch.Generator) -> Tensor:
    """The batch moved by one random shift, half of the images mirrored, with noise added."""
    height, width = images_NCHW.shape[2:]
    padded = F.pad(images_NCHW, [how.shift] * 4, mode="replicate")
    top, left = torch.randint(0, 2 * how.shift + 1, (2,), generator=generator).tolist()
    batch = padded[:, :, top : top + height, left : left + width]
    if how.flip:
        mirrored_N = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(mirrored_N.to(batch.device)[:, None, None, None], batch.flip(3), batch)
    noise = torch.randn(batch.shape, generator=generator)
    return batch + how.noise * noise.to(batch.device)


def train(images_NCHW: Tensor, targets_N: Tensor, arch: ClassifierArch, how: Training) -> ClassifierNet:
    """The trained classifier, in evaluation mode; images and targets lie on the device to train on."""
    torch.manual_seed(how.seed)
    generator = torch.Generator().manual_seed(how.seed)
    net = ClassifierNet(arch).to(images_NCHW.device)
    optimizer = torch.optim.AdamW(net.parameters(), how.learning_rate, weight_decay=1e-2)
    warm = max(1, how.num_steps // 10)
    for step in range(how.num_steps):
        factor = min((step + 1) / warm, (how.num_steps - step) / max(1, how.num_steps - warm))
        optimizer.param_groups[0]["lr"] = how.learning_rate * factor
        rows = torch.randint(0, len(images_NCHW), (how.batch_size,), generator=generator).to(images_NCHW.device)
        loss = F.cross_entropy(net(varied(images_NCHW[rows], how, generator)), targets_N[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if how.num_steps >= 10 and (step + 1) % (how.num_steps // 10) == 0:
            print(f"step {step + 1}/{how.num_steps}, loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return net.eval()


@torch.no_grad()
def normalise(net: ClassifierNet, images_NCHW: Tensor) -> None:
    """Scale the features to mean square 1 on these images, in place; the logits stay (the rectifier is homogeneous).

    Kernel distances want features of order 1, and scores of different detectors get numbers of like size.
    """
    squares = torch.cat([net.features(chunk).double().square() for chunk in images_NCHW.split(500)])
    scale = float(squares.mean().sqrt())
    if not 0 < scale < float("inf"):
        raise ConfigError(f"the features came out with mean square {scale**2}; train with a lower `learning_rate`.")
    net.hidden.weight /= scale
    net.hidden.bias /= scale
    net.out.weight *= scale


@torch.no_grad()
def accuracy(net: ClassifierNet, images_NCHW: Tensor, targets_N: Tensor) -> float:
    """Share of images classified right."""
    right = [
        (net(x).argmax(1) == y).double() for x, y in zip(images_NCHW.split(500), targets_N.split(500), strict=True)
    ]
    return float(torch.cat(right).mean())


def make(dataset: Dataset, how: Training) -> tuple[bytes, float]:
    """The weights file and the accuracy on held-out images.

    Raises:
        ConfigError: no labels, fewer than two classes, a class of one image, or images that cannot be halved so often.
    """
    images_NCHW, labels_N = dataset.images(), dataset.labels()
    if labels_N is None:
        raise ConfigError(
            f"dataset `{dataset.name}` has no labels, and a classifier needs them. Name them in "
            "`dataset.labels_key` (npz) or `dataset.label_column` (parquet), or sort the images into subfolders."
        )
    classes, targets_N, counts = labels_N.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or int(counts.min()) < 2:
        raise ConfigError(
            f"dataset `{dataset.name}` has {len(classes)} classes, the smallest of {int(counts.min())} images; "
            "a classifier needs at least 2 classes of 2 images."
        )
    arch = ClassifierArch(tuple(images_NCHW.shape[1:]), how.widths, how.num_features, len(classes))
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if how.device == "auto" else how.device)
    rows, held = held_out_rows(labels_N, how.held_out, how.seed)
    net = train(images_NCHW[rows].to(device), targets_N[rows].to(device), arch, how)
    normalise(net, images_NCHW[rows].to(device))
    score = accuracy(net, images_NCHW[held].to(device), targets_N[held].to(device))
    made = {
        "script": "scripts/train_detector.py",
        "held_out_accuracy": round(score, 4),
        "num_held_out": len(held),
        "dataset": {"name": dataset.name, "num_images": len(images_NCHW), "digest": images_digest(images_NCHW)},
        "training": {field.name: getattr(how, field.name) for field in fields(how) if field.name != "device"},
        "torch": torch.__version__,
    }
    return pack_classifier(net, arch, made), score


def main(words: Sequence[str]) -> int:
    """Train, test, write, and say what was made; 2 for the user's mistakes."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        data = [word for word in words if word.partition("=")[0].partition(".")[0] == "dataset"]
        defaults = {"to": None, **{field.name: None for field in fields(Training)}}
        texts = parse_words([word for word in words if word not in data], defaults)
        to, how = Path(need(texts, "to")).expanduser(), Training.read(texts)
        if to.exists():
            raise OutputExistsError(f"output `{to}` exists already. Nothing is overwritten; choose another path.")
        torch.use_deterministic_algorithms(True)
        config = compose_config(["name=detector", "bank.path=none", *data])
        contents, score = make(registry.build("dataset", config["dataset"]), how)
        to.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(to, contents)
        print(f"held-out accuracy {score:.4f}\ndetector: {to}, {len(contents)} bytes")
    except LcscError as error:
        print(f"train_detector: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
