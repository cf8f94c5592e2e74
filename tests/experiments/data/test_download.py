"""CIFAR-10's archive is downloaded and unpacked; if a server or an archive is bad, the next server is tried."""

import hashlib
import http.server
import io
import tarfile
import threading
import time

import numpy as np
import pytest

from experiments.data import cifar10, download


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """An empty cache, and no CIFAR10_DIR."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)


@pytest.fixture
def folder(tmp_path):
    """A folder in the official layout; the files hold random bytes, since nothing here reads them."""
    folder = tmp_path / "data" / cifar10.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for name in (*cifar10.BATCHES, cifar10.META):
        (folder / name).write_bytes(rng.bytes(30_000))
    return folder


# Unpacking ------------------------------------------------------------------------------------------------------------


def make_archive(folder, extra=()):
    """Returns the bytes of an archive of the folder, and of further members, pairs of TarInfo and bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, arcname=cifar10.FOLDER)
        for member, content in extra:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def target(tmp_path):
    (tmp_path / "unpacked").mkdir()
    return tmp_path / "unpacked" / cifar10.FOLDER


def extract(tmp_path, content, target):
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(content)
    download.extract_cifar10(archive, target)


def test_an_unpacked_archive_holds_the_files(folder, tmp_path, target):
    extract(tmp_path, make_archive(folder), target)
    for name in (*cifar10.BATCHES, cifar10.META):
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_unpacking_writes_nothing_but_the_seven_files(folder, tmp_path, target):
    evil = [
        (tarfile.TarInfo("../evil"), b"evil"),
        (tarfile.TarInfo(str(tmp_path / "unpacked" / "evil")), b"evil"),
        (tarfile.TarInfo(f"{cifar10.FOLDER}/evil"), b"evil"),
    ]
    extract(tmp_path, make_archive(folder, evil), target)
    assert {path.name for path in target.parent.rglob("*")} == {cifar10.FOLDER, *cifar10.BATCHES, cifar10.META}


def test_a_link_in_place_of_a_file_is_not_followed(folder, tmp_path, target):
    (folder / "test_batch").unlink()
    link = tarfile.TarInfo(f"{cifar10.FOLDER}/test_batch")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ValueError, match="is not CIFAR-10's archive cifar-10-python.tar.gz: it lacks test_batch"):
        extract(tmp_path, make_archive(folder, [(link, b"")]), target)


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_a_truncated_archive_is_refused_and_leaves_nothing(folder, tmp_path, target, cut):
    with pytest.raises(ValueError, match="archive.tar.gz is not CIFAR-10's archive .*Delete it and try again"):
        extract(tmp_path, make_archive(folder)[:cut], target)
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("position", [0, -8], ids=["not gzip", "checksum"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(folder, tmp_path, target, position):
    content = bytearray(make_archive(folder))
    content[position] ^= 1
    with pytest.raises(ValueError, match="archive.tar.gz is not CIFAR-10's archive .*BadGzipFile"):
        extract(tmp_path, bytes(content), target)
    assert not list(target.parent.iterdir())


def test_unpacking_twice_at_once_keeps_the_first(folder, tmp_path, target):
    extract(tmp_path, make_archive(folder), target)
    extract(tmp_path, make_archive(folder), target)
    assert sorted(path.name for path in target.iterdir()) == sorted([*cifar10.BATCHES, cifar10.META])


# Downloading ----------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves the archive at /good, other bytes at /wrong, and nothing after the header at /silent."""

    daemon_threads = True

    def __init__(self, archive):
        self.archive = archive
        self.requested = []
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        if self.path == "/absent":
            return self.send_error(404)
        content = b"something else" if self.path == "/wrong" else self.server.archive
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path == "/silent":
            return time.sleep(3 * download.TIMEOUT_SECONDS)
        self.wfile.write(content)

    def log_message(self, *_):
        """Prints nothing."""


@pytest.fixture
def server(folder, monkeypatch):
    archive = make_archive(folder)
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(archive) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_download_lands_in_the_cache_and_leaves_no_archive(server, folder):
    assert download.download_cifar10((server.url("good"),)) == cifar10.cache_folder() == cifar10.find_cifar10()
    assert (cifar10.cache_folder() / "test_batch").read_bytes() == (folder / "test_batch").read_bytes()
    assert [path.name for path in cifar10.cache_folder().parent.iterdir()] == [cifar10.FOLDER]


@pytest.mark.parametrize("bad", ["absent", "wrong", "silent"])
def test_the_next_server_is_tried_when_one_fails(server, bad):
    download.download_cifar10((server.url(bad), server.url("good"), server.url("never")))
    assert server.requested == [f"/{bad}", "/good"]


def test_when_all_servers_fail_each_is_named_and_the_user_told_what_to_do(server):
    message = r"(?s)/absent: 404.*/wrong: .*hash.*--data-dir or CIFAR10_DIR.*train --data digits"
    with pytest.raises(ConnectionError, match=message):
        download.download_cifar10((server.url("absent"), server.url("wrong")))


def test_the_original_server_comes_last():
    assert "cs.toronto.edu" in download.URLS[-1]
    assert len(download.URLS) > 1
