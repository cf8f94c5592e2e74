"""Finds CIFAR-10's files, and reads them without trusting them.

Convention: a folder means `cifar-10-batches-py`, which holds the six batches and `batches.meta`.

References:
  Krizhevsky 2009, "Learning multiple layers of features from tiny images"; https://www.cs.toronto.edu/~kriz/cifar.html
"""

import hashlib
import io
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pooch

FOLDER = "cifar-10-batches-py"
# The files of images, the last one for testing, and the MD5 of the official files; a copy may differ.
BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
META = "batches.meta"
IMAGES_PER_BATCH = 10_000
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

ARCHIVE = "cifar-10-python.tar.gz"


def cache_folder() -> Path:
    """Returns the folder in the user's cache for the download; it need not exist."""
    return Path(pooch.os_cache("jaxbn")) / FOLDER


def find_cifar10(data_dir: str | Path | None = None) -> Path | None:
    """Finds CIFAR-10 in `data_dir`, the folder named by CIFAR10_DIR, or the cache, in this order; downloads nothing.

    Args:
      data_dir: the folder that holds `cifar-10-batches-py`, or that folder itself.

    Returns:
      The folder of the files, or None.

    Raises:
      ValueError: `data_dir` or CIFAR10_DIR names a folder without CIFAR-10.
    """
    for label, place in (("data_dir (--data-dir)", data_dir), ("CIFAR10_DIR", os.environ.get("CIFAR10_DIR"))):
        if place:
            place = Path(place).expanduser()
            for folder in (place / FOLDER, place):
                if (folder / "data_batch_1").is_file():
                    return folder
            raise ValueError(
                f"{label}={str(place)!r} does not hold CIFAR-10. Unpack {ARCHIVE} there, or leave the option out to "
                "use the cache or a download."
            )
    return cache_folder() if cache_folder().is_dir() else None


def read_cifar10(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Reads the six batches and checks their content.

    Args:
      folder: the folder of the files.

    Returns:
      The images of each batch, uint8 [10000, 32, 32, 3]; their labels, int32 [10000]; and whether the batches are
      identical to the official ones, byte by byte. The last batch is for testing.

    Raises:
      ValueError: a file is missing, is not a pickle, refers to functions or classes that CIFAR-10's files do not, or
        holds data of another shape or type.
    """
    names = _unpickle(folder / META, _read_bytes(folder / META)).get(b"label_names")
    if names != [name.encode() for name in CLASS_NAMES]:
        raise _not_cifar10(folder / META, f"its classes are {names!r:.100}")
    images, labels, official = [], [], True
    for name, md5 in BATCHES.items():
        raw = _read_bytes(folder / name)
        official &= hashlib.md5(raw, usedforsecurity=False).hexdigest() == md5
        batch_images, batch_labels = _parse_batch(folder / name, raw)
        images.append(batch_images)
        labels.append(batch_labels)
    return images, labels, official


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _not_cifar10(path, "it is missing") from None


def _parse_batch(path: Path, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Parses a pickled batch to its images [n, 32, 32, 3] and labels [n]."""
    content = _unpickle(path, raw)
    planes, labels = content.get(b"data"), content.get(b"labels")
    n, classes = IMAGES_PER_BATCH, len(CLASS_NAMES)
    if not (isinstance(planes, _Array) and planes.shape == (n, 3 * 32 * 32)):
        raise _not_cifar10(path, f"its data is not a uint8 array of shape {(n, 3 * 32 * 32)}")
    if not (isinstance(labels, list) and len(labels) == n and all(type(x) is int and 0 <= x < classes for x in labels)):
        raise _not_cifar10(path, f"its labels are not a list of {n} integers from 0 to {classes - 1}")
    # Each row holds the red, then the green, then the blue plane of an image.
    images = np.frombuffer(planes.content, np.uint8).reshape(n, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.int32)


def _unpickle(path: Path, raw: bytes) -> dict[Any, Any]:
    """Returns the pickled dictionary; `path` is only for the message of an error."""
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # truncated files, and files that are not pickles, raise many kinds of errors
        raise _not_cifar10(path, f"{error} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _not_cifar10(path, f"it holds a {type(content).__name__} instead of a dictionary")
    return content


def _not_cifar10(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not the CIFAR-10 file of that name: {reason}. Unpack {ARCHIVE} again, or delete the folder if it "
        "is in the cache, to download it again."
    )


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and uint8 arrays; refuses everything else.

    Loading a pickle may import and call any function that the file names. Here, the few names in CIFAR-10's files are
    mapped to stand-ins, so that not even NumPy is called with arguments from the file.
    """

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy.core.numeric" | "numpy._core.numeric", "_frombuffer":  # from pickle protocol 5 on
                return _Array.from_buffer
            case "numpy", "ndarray":
                return None  # only an argument of _reconstruct
            case "numpy", "dtype":
                return lambda kind, *_: _UInt8(kind)
            case "_codecs", "encode":  # how Python 3 writes bytes for Python 2
                return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, unlike CIFAR-10's files")


class _Array:
    """Stands in for numpy.ndarray while unpickling: the shape and the bytes of a uint8 array."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    @classmethod
    def from_buffer(cls, content: Any, kind: Any, shape: tuple[int, ...], order: str) -> "_Array":
        array = cls()
        array.__setstate__((None, shape, kind, order != "C", bytes(content) if type(content) is bytearray else content))
        return array

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, column_major, content = state
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError(f"it holds an array made of a {type(content).__name__} instead of bytes")
        if column_major or len(content) != math.prod(shape):
            raise pickle.UnpicklingError(f"it holds {len(content)} bytes for an array of shape {shape}")
        self.shape, self.content = shape, content


class _UInt8:
    """Stands in for numpy.dtype while unpickling."""

    def __init__(self, kind: Any):
        if kind not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of {kind!r}, not of uint8")

    def __setstate__(self, state: tuple) -> None:
        """Ignores byte order and alignment, which mean nothing for uint8."""
