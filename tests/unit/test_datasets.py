"""Datasets: shapes, ranges and values against the files and libraries they come from."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lcsc.core import registry
from lcsc.core.errors import ConfigError, MissingExtraError
from lcsc.core.seeds import Purpose, SeedRange
from lcsc.datasets.digits import Digits
from lcsc.datasets.gaussian import Gaussian
from lcsc.datasets.image_folder import ImageFolder
from lcsc.datasets.npz import Npz
from lcsc.datasets.parquet import Parquet
from lcsc.datasets.split import split_halves

PIXELS_NHWC = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)


def save_npz(folder: Path, array: np.ndarray) -> str:
    np.savez(folder / "set.npz", images=array)
    return str(folder / "set.npz")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_digits_are_scikit_learns() -> None:
    dataset = Digits()
    images = dataset.images()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert dataset.image_shape == (1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    assert dataset.name == "digits"
    np.testing.assert_array_equal((images.numpy() + 1) * 8, load_digits().images[:, None])
    assert dataset.images() is images


def test_gaussian_images_have_the_stated_moments() -> None:
    dataset = Gaussian(shape=[2, 3, 2], num_images=20_000)
    images = dataset.images()
    index = np.arange(12).reshape(2, 3, 2)
    np.testing.assert_allclose(dataset.mean_CHW, 0.3 * np.cos(index), rtol=1e-6)
    np.testing.assert_allclose(dataset.std_CHW, 0.1 + 0.04 * np.sin(index), rtol=1e-6)
    assert images.shape == (20_000, 2, 3, 2)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    z = (images - dataset.mean_CHW) / dataset.std_CHW  # five standard errors
    np.testing.assert_allclose(z.mean(0), 0, atol=5 / 20_000**0.5)
    np.testing.assert_allclose(z.var(0), 1, atol=5 * (2 / 20_000) ** 0.5)
    correlation = np.corrcoef(z.reshape(20_000, -1).T) - np.eye(12)
    np.testing.assert_allclose(correlation, 0, atol=5 / 20_000**0.5)


def test_gaussian_images_are_fixed_by_seed_and_index() -> None:
    images = Gaussian().images()
    assert images.shape == (4096, 1, 2, 2)
    assert torch.equal(Gaussian(num_images=10).images(), images[:10])
    assert not torch.equal(Gaussian(seed=1).images(), images)
    sampler_noise = torch.from_numpy(SeedRange(0, Purpose.SEARCH).normal(range(4096), (1, 2, 2)))
    z = (images - Gaussian().mean_CHW) / Gaussian().std_CHW
    assert abs((z * sampler_noise).mean()) < 5 / 16384**0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [2, 2]}, r"has `shape` \[2, 2\]; give channels, height, width"),
        ({"shape": [1, 0, 2]}, r"has `shape` \[1, 0, 2\]"),
        ({"num_images": 0}, "has `num_images` 0; it needs at least 1"),
    ],
)
def test_gaussian_fields_are_checked(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset `gaussian` {message}"):
        Gaussian(**fields)


NCHW = PIXELS_NHWC.transpose(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS_NHWC, NCHW),
        (PIXELS_NHWC.transpose(0, 3, 1, 2), NCHW),
        (PIXELS_NHWC[..., 0], NCHW[:, :1]),
        (PIXELS_NHWC[..., :1], NCHW[:, :1]),
        (PIXELS_NHWC / 255, NCHW),
        ((PIXELS_NHWC / 255).astype(np.float16), NCHW),
        (NCHW, NCHW),
        (NCHW.astype(np.float32), NCHW),
    ],
    ids=["nhwc", "nchw", "nhw", "nhw1", "float01", "half01", "float64", "float32"],
)
def test_npz_layouts_and_ranges(tmp_path: Path, array: np.ndarray, expected: np.ndarray) -> None:
    dataset = Npz(path=save_npz(tmp_path, array))
    images = dataset.images()
    np.testing.assert_allclose(images, expected, atol=1e-3 if array.dtype == np.float16 else 1e-6)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert dataset.images() is images
    assert dataset.image_shape == expected.shape[1:]
    assert dataset.name == "set"


def test_extreme_bytes_are_the_ends_of_the_range(tmp_path: Path) -> None:
    images = Npz(path=save_npz(tmp_path, np.array([[[0, 255]]], dtype=np.uint8))).images()
    assert images.flatten().tolist() == [-1.0, 1.0]


def test_resize_averages_blocks_like_pillow(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    images = Npz(path=save_npz(tmp_path, pixels), resize=8).images()
    assert images.shape == (3, 1, 8, 8)
    assert images.min() >= -1
    assert images.max() <= 1
    for image, source in zip(images, pixels, strict=True):
        small = Image.fromarray(source.astype(np.float32)).resize((8, 8), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image[0], np.asarray(small) / 127.5 - 1, atol=1e-5)


def test_resize_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((1, 4, 10), dtype=np.uint8)
    pixels[:, :, 3:7] = 255
    assert torch.equal(Npz(path=save_npz(tmp_path, pixels), resize=4).images(), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4), dtype=np.int64), "array `images` of `.*set.npz` holds int64; images are uint8 or floats"),
        (np.full((2, 4, 4), 255.0), r"holds floats in \[255.0, 255.0\]; allowed are \[0, 1\] and \[-1, 1\]"),
        (np.full((2, 4, 4), np.nan), r"holds floats in \[nan, nan\]"),
        (np.zeros((4, 4)), r"has shape \(4, 4\); images are NHW, NHWC or NCHW with 1, 3 or 4 channels"),
        (np.zeros((2, 7, 4, 7)), r"has shape \(2, 7, 4, 7\)"),
        (np.array([{}]), "cannot read .* as an .npz archive: .*pickle"),
    ],
)
def test_arrays_that_are_no_images(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Npz(path=save_npz(tmp_path, array)).images()


def test_npz_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`.*set.npz` has no array `image`. Did you mean `images`?"):
        Npz(path=save_npz(tmp_path, PIXELS_NHWC), key="image").images()
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"cannot read `.*text.npz` as an .npz archive"):
        Npz(path=str(tmp_path / "text.npz")).images()
    np.save(tmp_path / "one.npy", PIXELS_NHWC)
    with pytest.raises(ConfigError, match=r"cannot read `.*one.npy` as an .npz archive"):
        Npz(path=str(tmp_path / "one.npy")).images()


def test_image_folder_reads_in_sorted_order(tmp_path: Path) -> None:
    for name, pixels in zip(["b.png", "a.png", "c/a.PNG", "c.bmp"], PIXELS_NHWC[:4], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = ImageFolder(path=str(tmp_path))
    np.testing.assert_allclose(dataset.images(), NCHW[[1, 0, 3, 2]], atol=1e-6)  # a, b, c.bmp, c/a
    assert dataset.image_shape == (3, 6, 6)
    assert dataset.name == tmp_path.name


def test_image_folder_grey_and_mixed(tmp_path: Path) -> None:
    Image.fromarray(PIXELS_NHWC[0, :, :, 0]).save(tmp_path / "a.png")
    grey = ImageFolder(path=str(tmp_path)).images()
    np.testing.assert_allclose(grey, NCHW[:1, :1], atol=1e-6)
    Image.fromarray(np.dstack([PIXELS_NHWC[1], np.full((6, 6), 9, np.uint8)])).save(tmp_path / "b.png")  # RGBA
    mixed = ImageFolder(path=str(tmp_path)).images()
    np.testing.assert_allclose(mixed, np.stack([NCHW[0, [0, 0, 0]], NCHW[1]]), atol=1e-6)


def test_image_folder_sizes_must_agree_or_be_made_to(tmp_path: Path) -> None:
    Image.fromarray(PIXELS_NHWC[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS_NHWC[1, :4]).save(tmp_path / "b.png")
    with pytest.raises(ConfigError, match=r"different size: the first is \(6, 6\), `b.png` is \(4, 6\). Set `resize`"):
        ImageFolder(path=str(tmp_path)).images()
    assert ImageFolder(path=str(tmp_path), resize=3).image_shape == (3, 3, 3)


def test_image_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset `image_folder` holds no image"):
        ImageFolder(path=str(tmp_path)).images()
    (tmp_path / "broken.png").write_bytes(png(PIXELS_NHWC[0])[:60])
    with pytest.raises(ConfigError, match=r"dataset `image_folder` cannot read `broken.png` as an image"):
        ImageFolder(path=str(tmp_path)).images()


@pytest.mark.parametrize(("name", "kind"), [("npz", "file"), ("parquet", "file"), ("image_folder", "folder")])
def test_missing_paths_are_one_sentence(name: str, kind: str) -> None:
    dataset = registry.build("dataset", name, path="/nowhere/at/all")
    with pytest.raises(
        ConfigError, match=f"dataset `{name}` found no {kind} `/nowhere/at/all`. Give the path of a {kind}"
    ):
        dataset.images()
    with pytest.raises(ConfigError, match=f"dataset `{name}` has `resize` 0; give a side of at least 1 pixel, or null"):
        registry.build("dataset", name, path="x", resize=0)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(
        MissingExtraError, match=r"dataset `parquet` needs `pyarrow`, which is not installed; install it with"
    ):
        Parquet(path=str(tmp_path / "a.parquet")).images()


def test_parquet_reads_nested_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    rows = [{"img": {"bytes": png(p), "path": None}, "label": i} for i, p in enumerate(PIXELS_NHWC)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    dataset = Parquet(path=str(path))
    np.testing.assert_allclose(dataset.images(), NCHW, atol=1e-6)
    assert dataset.image_shape == (3, 6, 6)
    assert dataset.name == "train"
    assert Parquet(path=str(path), resize=2).image_shape == (3, 2, 2)
    with pytest.raises(ConfigError, match=r"has no column `image.bytes`. Did you mean `img.bytes`?"):
        Parquet(path=str(path), column="image.bytes").images()
    with pytest.raises(ConfigError, match=r"row 0 of column `label` .* is int, not bytes"):
        Parquet(path=str(path), column="label").images()
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ConfigError, match=r"cannot read `.*train.parquet` as parquet"):
        Parquet(path=str(path)).images()


# --- labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "labels", "targets", "Y"])
def test_npz_finds_images_and_labels_under_any_usual_name(tmp_path: Path, name: str) -> None:
    labels = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{"pictures": PIXELS_NHWC, name: labels, "other": np.zeros((5, 2)), "n": 5})
    dataset = Npz(path=str(tmp_path / "a.npz"))
    np.testing.assert_allclose(dataset.images(), NCHW, atol=1e-6)
    assert dataset.labels().tolist() == [3, 1, 4, 1, 5]
    assert dataset.labels().dtype == torch.int64
    assert dataset.labels() is dataset.labels()
    assert Npz(path=str(tmp_path / "a.npz"), labels_key=None).labels() is None


def test_npz_may_hold_what_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, scans=np.zeros((4, 8, 8), np.uint8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert Npz(str(path)).images().shape == (4, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"has no array `readme.txt`\..* Known: scans"):
        Npz(str(path), key="readme.txt").images()


def test_npz_prefers_images_and_asks_where_it_is_in_doubt(tmp_path: Path) -> None:
    path, text = tmp_path / "a.npz", np.array(["b", "a", "b", "c", "a"])
    np.savez(path, images=PIXELS_NHWC, masks=PIXELS_NHWC[..., 0], kind=text, label=np.arange(5), y=np.arange(5))
    with pytest.raises(ConfigError, match=r"several arrays that could be labels: label, y\. Name one in `dataset.lab"):
        Npz(path=str(path)).images()
    dataset = Npz(path=str(path), labels_key="kind")
    np.testing.assert_allclose(dataset.images(), NCHW, atol=1e-6)
    assert dataset.labels().tolist() == [1, 0, 1, 2, 0]
    np.savez(path, a=PIXELS_NHWC, b=PIXELS_NHWC)
    with pytest.raises(
        ConfigError, match=r"several arrays that could be images: a, b\. Name one of a, b in `dataset.k"
    ):
        Npz(path=str(path)).images()
    np.savez(path, a=np.zeros(5))
    with pytest.raises(ConfigError, match=r"has no array of images\. Name one of a in `dataset.key`"):
        Npz(path=str(path)).images()
    assert Npz(path=save_npz(tmp_path, PIXELS_NHWC)).labels() is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(4, dtype=int), r"array `labels` of `.*set.npz` has shape \(4,\) for 5 images"),
        (np.zeros((5, 1), dtype=int), r"has shape \(5, 1\) for 5 images; labels are one number for each image"),
        (np.zeros(5), "array `labels` of `.*set.npz` holds float64; labels are whole numbers or texts"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "set.npz", images=PIXELS_NHWC, labels=labels)
    with pytest.raises(ConfigError, match=message):
        Npz(path=str(tmp_path / "set.npz")).labels()
    with pytest.raises(ConfigError, match="has no array `label`. Did you mean `labels`?"):
        Npz(path=str(tmp_path / "set.npz"), labels_key="label").labels()


def test_parquet_finds_images_and_labels(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    extra = {"image": png(PIXELS_NHWC[0]), "meta": {"target": "cat"}, "fine_label": 7}
    rows = [{**extra, "image": png(p), "meta": {"target": t}} for p, t in zip(PIXELS_NHWC, "badac", strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    dataset = Parquet(path=str(path))
    np.testing.assert_allclose(dataset.images(), NCHW, atol=1e-6)
    assert dataset.labels().tolist() == [1, 0, 3, 0, 2]
    assert Parquet(path=str(path), label_column="fine_label").labels().tolist() == [7] * 5
    assert Parquet(path=str(path), label_column=None).labels() is None
    with pytest.raises(ConfigError, match="has no column `fine_labels`. Did you mean `fine_label`?"):
        Parquet(path=str(path), label_column="fine_labels").labels()
    pq.write_table(pa.Table.from_pylist([{**row, "label": i or None} for i, row in enumerate(rows)]), path)
    with pytest.raises(ConfigError, match=r"several columns that could be labels: meta\.target, label"):
        Parquet(path=str(path)).images()
    with pytest.raises(ConfigError, match="column `label` of `.*` holds object; labels are whole numbers or texts"):
        Parquet(path=str(path), label_column="label").labels()
    pq.write_table(pa.Table.from_pylist([{**row, "thumb": b""} for row in rows]), path)
    with pytest.raises(ConfigError, match="several columns that could be images: image, thumb"):
        Parquet(path=str(path)).images()


def test_image_folder_takes_subfolders_as_classes(tmp_path: Path) -> None:
    for name, pixels in zip(["dog/a.png", "cat/b.png", "cat/x/a.png", "dog/b.png"], PIXELS_NHWC, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(tmp_path / name)
    dataset = ImageFolder(path=str(tmp_path))
    np.testing.assert_allclose(dataset.images(), NCHW[[1, 2, 0, 3]], atol=1e-6)
    assert dataset.labels().tolist() == [0, 0, 1, 1]
    assert ImageFolder(path=str(tmp_path), subfolder_labels=False).labels() is None
    assert ImageFolder(path=str(tmp_path / "cat")).labels() is None  # an image beside the subfolder
    assert ImageFolder(path=str(tmp_path / "dog")).labels() is None


def real(name: str) -> str:
    """A file of real data, from $LCSC_DATA or shared/data of the checkout; the test skips where there is none."""
    folder = Path(os.environ.get("LCSC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / name).is_file():
        pytest.skip(f"no {name}; LCSC_DATA names the folder it lies in")
    return str(folder / name)


def test_mnist_halves_are_stratified() -> None:
    dataset = Npz(path=real("mnist10k.npz"), resize=16)
    assert dataset.images().shape == (10_000, 1, 16, 16)
    labels = dataset.labels().numpy()
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # MNIST's test set
    search, report = split_halves(10_000, 0, labels)
    assert np.abs(np.bincount(labels[search]) - np.bincount(labels[report])).max() <= 1


@pytest.mark.slow
def test_cifar_is_read_with_its_labels() -> None:
    pytest.importorskip("pyarrow")
    dataset = Parquet(path=real("cifar10/test.parquet"), resize=8)
    assert dataset.images().shape == (10_000, 3, 8, 8)
    assert np.bincount(dataset.labels().numpy()).tolist() == [1000] * 10


# --- halves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [2, 3, 1797])
def test_halves_are_disjoint_sorted_and_cover_all(num_images: int) -> None:
    search, report = split_halves(num_images, 7)
    assert len(search) == num_images // 2
    assert len(report) == num_images - num_images // 2
    assert np.all(np.diff(search) > 0)
    assert np.all(np.diff(report) > 0)
    assert sorted([*search, *report]) == list(range(num_images))


def test_halves_follow_the_seed_alone() -> None:
    first, again, other = (split_halves(1000, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    shared = len(np.intersect1d(first, other))
    assert 200 < shared < 300  # 250 expected, standard deviation 8
    with pytest.raises(ConfigError, match=r"cannot split 1 image\(s\) into two halves"):
        split_halves(1, 0)


def test_stratified_halves_hold_every_class_equally():
    labels = Digits().labels().numpy()
    search, report = split_halves(1797, 0, labels)
    assert sorted([*search, *report]) == list(range(1797))
    assert len(report) - len(search) == 1
    difference = np.bincount(labels[report]) - np.bincount(labels[search])
    assert set(difference) <= {-1, 0, 1}
    other, _ = split_halves(1797, 1, labels)
    assert not np.array_equal(search, other)
    assert np.array_equal(search, split_halves(1797, 0, labels)[0])


def test_digit_labels_are_sklearns():
    assert np.array_equal(Digits().labels().numpy(), load_digits().target)


@pytest.mark.parametrize("objective", ["sample_quality", "denoising_loss", "fid_nfe"])
def test_other_images_or_labels_under_an_old_name_are_another_evaluator(tmp_path: Path, objective: str) -> None:
    kinds = {"model": "edm", "sampler": "euler", "metric": "kid_pixels"}
    if objective == "denoising_loss":
        kinds = {"model": "edm"}
    parts = {kind: registry.build(kind, name) for kind, name in kinds.items()}
    first, path = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), tmp_path / "data.npz"
    found = []
    labels = [0, 1, 0, 1]
    for images, classes in ((first, labels), (first[::-1], labels), (first, [0, 0, 1, 1]), (first, labels)):
        np.savez(path, images=images, labels=np.array(classes))
        dataset = registry.build("dataset", "npz", path=str(path))
        scorer = registry.build("objective", objective, **parts, dataset=dataset)
        found.append(scorer.circumstances())
    assert found[0] == found[3]
    assert len({row.pop("data_digest") for row in found}) == 3
    assert found[0] == found[1] == found[2]
