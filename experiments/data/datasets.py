"""The images of the studies: CIFAR-10 or digits, resized, and limited to some classes or a number of images.

Convention: images are uint8 [n, height, width, channels].
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.cifar10 import ARCHIVE, CLASS_NAMES, cache_folder, find_cifar10, read_cifar10
from experiments.data.download import download_cifar10

DIGITS_FOR_TRAINING = 1_400  # of 1,797


class Dataset(NamedTuple):
    """Images and labels as NumPy arrays.

    Attributes:
      name: "cifar10" or "digits".
      provenance: where the images come from, worded for publication.
      source: the same, with the local path of the files, if any.
      train_images: uint8 [n, size, size, channels], in a fixed random order.
      train_labels: int32 [n].
      test_images: uint8 [m, size, size, channels].
      test_labels: int32 [m].
      class_names: the name of each label.
    """

    name: str
    provenance: str
    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


def load(
    name: str,
    *,
    image_size: int,
    train_images: int | None = None,
    classes: tuple[int, ...] | None = None,
    channels: int | None = None,
    data_dir: str | Path | None = None,
    download: bool = True,
) -> Dataset:
    """Loads a data set, with its training images in a fixed random order.

    Args:
      name: "cifar10" or "digits".
      image_size: pixels per side. CIFAR-10 has 32 and the digits have 8. Blocks are averaged to make images smaller;
        pixels are repeated to enlarge them.
      train_images: keep this many training images, the first in the fixed order. None: all.
      classes: keep only these classes, renumbered in this order. None: all.
      channels: repeat gray images over this many channels. None: leave them as they are, 1 or 3.
      data_dir: the folder that holds `cifar-10-batches-py`, or that folder itself. None: see `find_cifar10`.
      download: whether to download CIFAR-10 (170 MB, once) if it is not found.

    Raises:
      ValueError: the data set has no such images, or a file has the wrong content.
      FileNotFoundError: CIFAR-10 was not found and `download` is False.
      ConnectionError: the download failed.
    """
    if name == "cifar10":
        folder = find_cifar10(data_dir)
        if folder is None and not download:
            raise FileNotFoundError(
                f"CIFAR-10 was not found. Unpack {ARCHIVE} to {cache_folder()}, or to another folder and pass that as "
                "--data-dir or CIFAR10_DIR, or allow the download."
            )
        dataset = _cifar10(folder or download_cifar10())
    elif name == "digits":
        dataset = _digits()
    else:
        raise ValueError(f"data must be 'cifar10' or 'digits', got {name!r}.")

    if classes is not None:
        dataset = _keep_classes(dataset, classes)
    available = len(dataset.train_images)
    if train_images is not None and not 1 <= train_images <= available:
        raise ValueError(
            f"train_images must be from 1 to {available}, the training images of {name}, got {train_images}."
        )
    # NumPy guarantees that the stream of RandomState never changes: every machine trains on the same images.
    order = np.random.RandomState(0).permutation(available)[:train_images]
    return dataset._replace(
        train_images=_with_channels(_resize(dataset.train_images[order], image_size), channels),
        train_labels=dataset.train_labels[order],
        test_images=_with_channels(_resize(dataset.test_images, image_size), channels),
    )


def _keep_classes(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    """Keeps the images of some classes, which are renumbered in the given order."""
    if unknown := [c for c in classes if c >= len(dataset.class_names)]:
        raise ValueError(
            f"classes must be from 0 to {len(dataset.class_names) - 1} for {dataset.name}, "
            f"got {', '.join(map(str, unknown))}."
        )
    # The new label of each old one; -1 marks the classes to drop.
    new_labels = np.full(len(dataset.class_names), -1, np.int32)
    new_labels[list(classes)] = np.arange(len(classes))
    train, test = new_labels[dataset.train_labels], new_labels[dataset.test_labels]
    return dataset._replace(
        train_images=dataset.train_images[train >= 0],
        train_labels=train[train >= 0],
        test_images=dataset.test_images[test >= 0],
        test_labels=test[test >= 0],
        class_names=tuple(dataset.class_names[c] for c in classes),
    )


def first_tests(dataset: Dataset, n: int) -> Dataset:
    """Keeps the first n test images, or all if there are fewer."""
    return dataset._replace(test_images=dataset.test_images[:n], test_labels=dataset.test_labels[:n])


def balance(dataset: Dataset) -> Dataset:
    """Keeps the same number of training images of every class, the first ones: as many as the smallest class has."""
    labels = dataset.train_labels
    rank = np.zeros(len(labels), int)  # position of an image among those of its class
    for label in range(len(dataset.class_names)):
        rank[labels == label] = np.arange(np.sum(labels == label))
    kept = rank < np.bincount(labels, minlength=len(dataset.class_names)).min()
    return dataset._replace(train_images=dataset.train_images[kept], train_labels=labels[kept])


def _cifar10(folder: Path) -> Dataset:
    """Reads CIFAR-10 from the folder of its files."""
    images, labels, official = read_cifar10(folder)
    kind = "the official files" if official else "a copy that is not byte-identical to the official files"
    return Dataset(
        name="cifar10",
        provenance=f"CIFAR-10, {kind}",
        source=f"CIFAR-10, {kind}, in {folder}",
        train_images=np.concatenate(images[:-1]),
        train_labels=np.concatenate(labels[:-1]),
        test_images=images[-1],
        test_labels=labels[-1],
        class_names=CLASS_NAMES,
    )


def _digits() -> Dataset:
    """Loads scikit-learn's 1,797 handwritten digits, 1,400 of them for training."""
    from sklearn.datasets import load_digits  # takes a second to import, which CIFAR-10 does not need

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))  # the file is sorted by writer
    train, test = order[:DIGITS_FOR_TRAINING], order[DIGITS_FOR_TRAINING:]
    provenance = "1,797 handwritten digits (UCI), carried by scikit-learn"
    return Dataset(
        name="digits",
        provenance=provenance,
        source=provenance,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        class_names=tuple("0123456789"),
    )


def _with_channels(images: np.ndarray, channels: int | None) -> np.ndarray:
    """Repeats gray images over `channels` channels."""
    if channels in (None, images.shape[-1]):
        return images
    if images.shape[-1] != 1:
        raise ValueError(
            f"channels must be None or {images.shape[-1]} for images of {images.shape[-1]} channels, got {channels}. "
            "Only gray images can be repeated."
        )
    return images.repeat(channels, axis=-1)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes square images [n, side, side, channels] to `size` pixels per side: averages blocks, or repeats pixels."""
    n, old, _, channels = images.shape
    if size >= old and size % old == 0:
        return images.repeat(size // old, axis=1).repeat(size // old, axis=2)
    if size < 1 or old % size != 0:
        raise ValueError(
            f"image_size must divide {old}, the side of the images, or be a multiple of it, got {size}. "
            "Choose 8, 16 or 32."
        )
    # One strided slice per position in a block: its rows and columns are those of the result. uint32 sums are exact.
    side = old // size
    sums = np.zeros((n, size, size, channels), np.uint32)
    for row in range(side):
        for column in range(side):
            sums += images[:, row::side, column::side]
    # Half of the divisor, added before the integer division, rounds to nearest.
    return ((sums + side**2 // 2) // side**2).astype(np.uint8)
