"""CIFAR-10's files: finding them, and reading them without trusting them.

Convention: a folder means `cifar-10-batches-py`, the one that holds the six batches and `batches.meta`.

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
# The images, the last file for testing, and the MD5 of the official files, from which a copy may differ.
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
    """Returns the folder in the user's cache where a download is kept, whether or not it exists."""
    return Path(pooch.os_cache("jaxbn")) / FOLDER


def find_cifar10(data_dir: str | Path | None = None) -> Path | None:
    """Finds CIFAR-10 in `data_dir`, else in the environment's CIFAR10_DIR, else in the cache; downloads nothing.

    Args:
      data_dir: the folder that holds `cifar-10-batches-py`, or that folder itself.

    Returns:
      The folder of the files, or None.

    Raises:
      ValueError: `data_dir` or CIFAR10_DIR names a place where CIFAR-10 is not.
    """
    for label, place in (("data_dir (--data-dir)", data_dir), ("CIFAR10_DIR", os.environ.get("CIFAR10_DIR"))):
        if place:
            place = Path(place).expanduser()
            for folder in (place / FOLDER, place):
                if (folder / "data_batch_1").is_file():
                    return folder
            raise ValueError(
                f"{label}={str(place)!r} does not hold CIFAR-10; accepted is a folder with {FOLDER} in it; "
                f"unpack {ARCHIVE} there, or leave it out to use the cache or a download."
            )
    return cache_folder() if cache_folder().is_dir() else None


def read_cifar10(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Reads the six batches and checks what is in them.

    Args:
      folder: the folder of the files.

    Returns:
      The images of each batch, uint8 [10000, 32, 32, 3]; their labels, int32 [10000]; and whether the batches are, byte
      by byte, the official ones. The last batch is for testing.

    Raises:
      ValueError: a file is missing, no pickle, names what CIFAR-10's files do not, or holds something of another shape
        or type. What the images show is not checked.
    """
    names = _unpickle((folder / META), _read_bytes(folder / META)).get(b"label_names")
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
    """Returns the images and labels in the bytes of a batch."""
    content = _unpickle(path, raw)
    planes, labels = content.get(b"data"), content.get(b"labels")
    n, classes = IMAGES_PER_BATCH, len(CLASS_NAMES)
    if not (isinstance(planes, _Array) and planes.shape == (n, 3 * 32 * 32)):
        raise _not_cifar10(path, f"its data is no uint8 array of shape {(n, 3 * 32 * 32)}")
    if not (isinstance(labels, list) and len(labels) == n and all(type(x) is int and 0 <= x < classes for x in labels)):
        raise _not_cifar10(path, f"its labels are no list of {n} whole numbers from 0 to {classes - 1}")
    # A row holds the red, the green and the blue plane in turn.
    images = np.frombuffer(planes.content, np.uint8).reshape(n, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.int32)


def _unpickle(path: Path, raw: bytes) -> dict[Any, Any]:
    """Returns the dictionary that was pickled to the file at `path`."""
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # what is cut short, or no pickle, fails in many ways
        raise _not_cifar10(path, f"{error} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise _not_cifar10(path, f"it holds a {type(content).__name__} instead of a dictionary")
    return content


def _not_cifar10(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is not the CIFAR-10 file of that name: {reason}; accepted are the files in {ARCHIVE}; "
        "unpack it again (if the folder is in the cache, delete it: it will be downloaded again)."
    )


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and uint8 arrays; any other thing that a pickle names is refused.

    A pickle may name any function and have it called. The few names in CIFAR-10's files lead to stand-ins, so that not
    even NumPy is called with what a file says.
    """

    def find_class(self, module, name):
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy.core.numeric" | "numpy._core.numeric", "_frombuffer":  # as from protocol 5 on
                return _Array.from_buffer
            case "numpy", "ndarray":
                return None  # only handed on to _reconstruct
            case "numpy", "dtype":
                return lambda kind, *_: _UInt8(kind)
            case "_codecs", "encode":  # how Python 3 writes bytes for Python 2
                return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10's files do not")


class _Array:
    """Stands in for numpy.ndarray while unpickling: the shape and the bytes of an array of uint8."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    @classmethod
    def from_buffer(cls, content, kind, shape, order):
        array = cls()
        array.__setstate__((None, shape, kind, order != "C", bytes(content) if type(content) is bytearray else content))
        return array

    def __setstate__(self, state):
        _, shape, _, column_major, content = state
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError(f"it holds an array made of a {type(content).__name__} instead of bytes")
        if column_major or len(content) != math.prod(shape):
            raise pickle.UnpicklingError(f"it holds {len(content)} bytes for an array of shape {shape}")
        self.shape, self.content = shape, content


class _UInt8:
    """Stands in for numpy.dtype while unpickling."""

    def __init__(self, kind):
        if kind not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it holds an array of {kind!r}, not of uint8")

    def __setstate__(self, state):
        """Ignores byte order and alignment, which a uint8 has not."""
