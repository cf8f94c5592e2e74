"""The images of the studies: CIFAR-10 or digits, and their augmentation.

Convention: images are [n, height, width, channels]. In a `Dataset` they are uint8; `augment` takes and returns floats.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.cifar10 import CLASS_NAMES, FOLDER, cache_folder, find_cifar10, read_cifar10
from experiments.data.download import download_cifar10

DIGITS_FOR_TRAINING = 1_400  # of 1,797


class Dataset(NamedTuple):
    """Images and labels in NumPy, to be put on a device as they are.

    Attributes:
      name: "cifar10" or "digits".
      provenance: where the images come from, a phrase fit for publishing.
      source: the same, with the local path of the files, where there are any.
      train_images: uint8 [n, size, size, channels], in a fixed random order.
      train_labels: int32 [n].
      test_images: uint8 [m, size, size, channels].
      test_labels: int32 [m].
      class_names: the name behind each label.
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
    """Loads a data set, its training images in a fixed random order.

    Args:
      name: "cifar10" or "digits".
      image_size: pixels per side. CIFAR-10 has 32, the digits have 8; smaller images are means over blocks, larger ones
        repeat the pixels.
      train_images: keep the first so many training images of the fixed order. None: all.
      classes: keep these classes alone, numbered anew in this order. None: all.
      channels: repeat grey images over so many channels. None: as they are, 1 or 3.
      data_dir: the folder that holds `cifar-10-batches-py`, or that folder itself. None: see `find_cifar10`.
      download: whether CIFAR-10 may be downloaded (170 MB, once) where it is not found.

    Returns:
      The data set.

    Raises:
      ValueError: the data set has no such images, or a file is not what it should be.
      FileNotFoundError: CIFAR-10 is not at hand and `download` is False.
      ConnectionError: no server sent CIFAR-10.
    """
    if name == "cifar10":
        folder = find_cifar10(data_dir)
        if folder is None and not download:
            raise FileNotFoundError(
                f"CIFAR-10 is not at hand; accepted is {FOLDER} in the folder that --data-dir or CIFAR10_DIR names, or "
                f"at {cache_folder()}; unpack cifar-10-python.tar.gz there, or allow the download."
            )
        dataset = _cifar10(folder or download_cifar10())
    elif name == "digits":
        dataset = _digits()
    else:
        raise ValueError(f"data={name!r}; accepted are 'cifar10', 'digits'; choose one of those.")

    if classes is not None:
        dataset = _keep_classes(dataset, classes)
    available = len(dataset.train_images)
    if train_images is not None and not 1 <= train_images <= available:
        raise ValueError(
            f"train_images={train_images}; {name} has {available} images for training; choose from 1 to {available}."
        )
    # RandomState, because NumPy promises never to change its stream: every machine trains on the same images.
    order = np.random.RandomState(0).permutation(available)[:train_images]
    return dataset._replace(
        train_images=_with_channels(_resize(dataset.train_images[order], image_size), channels),
        train_labels=dataset.train_labels[order],
        test_images=_with_channels(_resize(dataset.test_images, image_size), channels),
    )


def _keep_classes(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    """Returns the images of some classes, which are numbered anew in the order given."""
    if unknown := [c for c in classes if c >= len(dataset.class_names)]:
        raise ValueError(
            f"classes={classes}; {dataset.name} has no {', '.join(map(str, unknown))}; "
            f"choose from 0 to {len(dataset.class_names) - 1}."
        )
    numbers = np.full(len(dataset.class_names), -1, np.int32)
    numbers[list(classes)] = np.arange(len(classes))
    train, test = numbers[dataset.train_labels], numbers[dataset.test_labels]
    return dataset._replace(
        train_images=dataset.train_images[train >= 0],
        train_labels=train[train >= 0],
        test_images=dataset.test_images[test >= 0],
        test_labels=test[test >= 0],
        class_names=tuple(dataset.class_names[c] for c in classes),
    )


def first_tests(dataset: Dataset, n: int) -> Dataset:
    """Returns the data set with the first n test images alone, or all where there are fewer."""
    return dataset._replace(test_images=dataset.test_images[:n], test_labels=dataset.test_labels[:n])


def balance(dataset: Dataset) -> Dataset:
    """Returns the data set with as many training images of each class, the first ones, as the smallest class has."""
    labels = dataset.train_labels
    rank = np.zeros(len(labels), int)  # of each image among those of its class
    for label in range(len(dataset.class_names)):
        rank[labels == label] = np.arange(np.sum(labels == label))
    kept = rank < np.bincount(labels, minlength=len(dataset.class_names)).min()
    return dataset._replace(train_images=dataset.train_images[kept], train_labels=labels[kept])


def _cifar10(folder: Path) -> Dataset:
    """Returns CIFAR-10 from the folder of its files."""
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
    """Returns scikit-learn's 1,797 handwritten digits, 1,400 of them for training."""
    from sklearn.datasets import load_digits  # here, because it takes a second that CIFAR-10 does not need

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))  # the file holds one writer after another
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
    """Returns the images with so many channels, which only grey ones have not yet."""
    if channels in (None, images.shape[-1]):
        return images
    if images.shape[-1] != 1:
        raise ValueError(
            f"channels={channels}; images of {images.shape[-1]} channels keep theirs; only grey ones can be repeated."
        )
    return images.repeat(channels, axis=-1)


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Returns square images with `size` pixels per side: means over blocks, rounded, or repeated pixels."""
    n, old, _, channels = images.shape
    if size >= old and size % old == 0:
        return images.repeat(size // old, axis=1).repeat(size // old, axis=2)
    if size < 1 or old % size != 0:
        raise ValueError(
            f"image_size={size}; images of {old} pixels a side can be divided or multiplied by a whole number; "
            "choose 8, 16 or 32."
        )
    side = old // size
    sums = np.zeros((n, size, size, channels), np.uint32)
    for row in range(side):
        for column in range(side):
            sums += images[:, row::side, column::side]
    return ((sums + side**2 // 2) // side**2).astype(np.uint8)
