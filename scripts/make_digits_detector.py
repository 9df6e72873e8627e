"""Make the weights of the `digits` detector: python scripts/make_digits_detector.py [--out FILE]

Trains the classifier of lcsc/metrics/digits.py on 1,400 of scikit-learn's 1,797 digits, tests it on the
other 397, and writes a safetensors file of about 92 kB. Deterministic on one machine with one version of
torch; elsewhere the last bits, and so the digest, may differ, which is why the file ships with the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import safetensors.torch
import sklearn
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from lcsc.core.digests import file_sha256
from lcsc.core.files import write_bytes
from lcsc.metrics.digits import WEIGHTS_PATH, WEIGHTS_SHA256, DigitsNet

SEED = 0
NUM_TRAIN = 1400
NUM_STEPS = 1500
BATCH_SIZE = 128
#: Standard deviation of the noise added to training images: keeps features smooth off the data.
NOISE = 0.1


def digits_split(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (1400, 1, 8, 8) in [-1, 1], train labels, test images, test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def accuracy(net: DigitsNet, images_NCHW: Tensor, labels_N: Tensor) -> float:
    """Share of images classified right."""
    with torch.no_grad():
        return float((net(images_NCHW).argmax(1) == labels_N).double().mean())


def train(images_NCHW: Tensor, labels_N: Tensor, generator: torch.Generator) -> DigitsNet:
    """The trained classifier."""
    torch.manual_seed(SEED)
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(NUM_STEPS):
        rows = torch.randint(0, len(images_NCHW), (BATCH_SIZE,), generator=generator)
        batch = images_NCHW[rows]
        batch = batch + NOISE * torch.randn(batch.shape, generator=generator)
        loss = F.cross_entropy(net(batch), labels_N[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def main() -> None:
    """Train, test, write, and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS_PATH, help="file to write (default: the shipped one)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # the order of sums, hence the bits, depends on the number of threads
    torch.use_deterministic_algorithms(True)

    generator = torch.Generator().manual_seed(SEED)
    train_images, train_labels, test_images, test_labels = digits_split(generator)
    net = train(train_images, train_labels, generator)
    test_accuracy = accuracy(net, test_images, test_labels)
    made = {
        "script": "scripts/make_digits_detector.py",
        "test_accuracy": round(test_accuracy, 4),
        "num_test_images": len(test_images),
        "sklearn": sklearn.__version__,
        "torch": torch.__version__,
    }
    # One key only: safetensors writes several in no fixed order, and the digest would change from run to run.
    write_bytes(out, safetensors.torch.save(net.state_dict(), {"made": json.dumps(made, sort_keys=True)}))
    digest = file_sha256(out)
    print(f"test accuracy {test_accuracy:.4f} on {len(test_images)} images")
    print(f"{out}: {out.stat().st_size} bytes, SHA-256 {digest}")
    if digest != WEIGHTS_SHA256:
        print("This is not the digest in lcsc/metrics/digits.py: put it there to make these the shipped weights.")


if __name__ == "__main__":
    main()
