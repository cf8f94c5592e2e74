"""CIFAR-10's files are found and read; other files are refused by name."""

import hashlib
import pickle
import struct

import numpy as np
import pytest

from experiments.data import cifar10, datasets

N = 10  # images in a batch, for these tests


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch, tmp_path):
    """Batches of ten images, an empty cache, and no CIFAR10_DIR."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_BATCH", N)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)


def python2_string(value):
    """Pickles a byte string as Python 2 did its str."""
    return b"T" + struct.pack("<i", len(value)) + value


def python2_array(array, dtype=b"u1"):
    """Pickles an array of two axes as NumPy 1 did under Python 2."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"\x87R"
    shape = b"".join(b"M" + struct.pack("<H", size) for size in array.shape) + b"\x86"
    kind = b"cnumpy\ndtype\n" + python2_string(dtype) + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return made + b"(K\x01" + shape + kind + b"\x89" + python2_string(array.tobytes()) + b"tb"


def python2_dictionary(items):
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in items.items()) + b"u."


def python2_batch(planes, labels, dtype=b"u1"):
    """Pickles a batch as the official files are."""
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return python2_dictionary({b"data": python2_array(planes, dtype), b"labels": numbers})


def python2_meta(names=cifar10.CLASS_NAMES):
    return python2_dictionary({b"label_names": b"](" + b"".join(python2_string(n.encode()) for n in names) + b"e"})


def random_batch(seed):
    rng = np.random.RandomState(seed)
    return rng.randint(0, 256, (N, 3072)).astype(np.uint8), rng.randint(0, 10, N).tolist()


@pytest.fixture
def folder(tmp_path):
    """A folder in the official layout, with random images."""
    folder = tmp_path / "data" / cifar10.FOLDER
    folder.mkdir(parents=True)
    (folder / cifar10.META).write_bytes(python2_meta())
    for seed, name in enumerate(cifar10.BATCHES):
        (folder / name).write_bytes(python2_batch(*random_batch(seed)))
    return folder


# Finding --------------------------------------------------------------------------------------------------------------


def test_data_dir_may_be_the_folder_or_hold_it(folder):
    assert cifar10.find_cifar10(folder) == folder
    assert cifar10.find_cifar10(str(folder.parent)) == folder


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", str(folder.parent))
    assert cifar10.find_cifar10() == folder


def test_data_dir_goes_before_the_environment(folder, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", "/nowhere")
    assert cifar10.find_cifar10(folder) == folder


def test_the_cache_comes_last(folder):
    cifar10.cache_folder().parent.mkdir(parents=True)
    folder.rename(cifar10.cache_folder())
    assert cifar10.find_cifar10() == cifar10.cache_folder()


def test_none_means_that_cifar10_was_not_found():
    assert cifar10.find_cifar10() is None


def test_a_data_dir_without_cifar10_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir \(--data-dir\)='.*' does not hold CIFAR-10. Unpack .* there"):
        cifar10.find_cifar10(tmp_path)


def test_an_environment_without_cifar10_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"CIFAR10_DIR='.*' does not hold CIFAR-10. Unpack .* there"):
        cifar10.find_cifar10()


def test_without_download_absence_is_an_error_that_says_where_to_put_it():
    with pytest.raises(
        FileNotFoundError, match="not found. Unpack .* --data-dir or CIFAR10_DIR, or allow the download"
    ):
        datasets.load("cifar10", image_size=32, download=False)


# Reading --------------------------------------------------------------------------------------------------------------


def test_images_and_labels_are_those_of_the_files(folder):
    images, labels, _ = cifar10.read_cifar10(folder)
    for seed in range(6):
        planes, expected = random_batch(seed)
        np.testing.assert_array_equal(labels[seed], expected)
        # Row-major planes of red, green and blue.
        np.testing.assert_array_equal(images[seed][3, 5, 7], planes[3].reshape(3, 32, 32)[:, 5, 7])


def test_pickles_rewritten_by_python_3_are_read(folder):
    planes, labels = random_batch(0)
    for protocol in (2, 4, 5):
        (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": planes, b"labels": labels}, protocol))
        images, _, _ = cifar10.read_cifar10(folder)
        np.testing.assert_array_equal(images[0][:, 0, 0, 0], planes[:, 0])


def test_a_copy_is_not_taken_for_the_official_files(folder, monkeypatch):
    assert cifar10.read_cifar10(folder)[2] is False
    checksums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in cifar10.BATCHES}
    monkeypatch.setattr(cifar10, "BATCHES", checksums)
    assert cifar10.read_cifar10(folder)[2] is True


def test_a_loaded_data_set_names_its_folder_and_that_it_is_a_copy(folder):
    dataset = datasets.load("cifar10", image_size=16, data_dir=folder)
    assert dataset.train_images.shape == (5 * N, 16, 16, 3)
    assert dataset.test_images.shape == (N, 16, 16, 3)
    assert str(folder) in dataset.source
    assert dataset.provenance == "CIFAR-10, a copy that is not byte-identical to the official files"
    assert dataset.provenance in dataset.source


class Malicious:
    """Unpickled as Python would, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(folder, name, reason):
    return pytest.raises(
        ValueError, match=rf"{folder / name} is not the CIFAR-10 file of that name: .*{reason}.*. Unpack"
    )


def test_a_malicious_pickle_is_refused_and_not_run(folder, tmp_path):
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Malicious(tmp_path / "evil")}, 2))
    with refused(folder, "data_batch_2", r"it names .*open"):
        cifar10.read_cifar10(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "numpy.core.multiarray.scalar"]
)
def test_no_function_can_be_named(folder, name):
    module, _, function = name.rpartition(".")
    (folder / "test_batch").write_bytes(f"c{module}\n{function}\n.".encode())
    with refused(folder, "test_batch", f"it names {name}"):
        cifar10.read_cifar10(folder)


@pytest.mark.parametrize("bytes_left", [0, 1, 20, 1000, -1])
def test_a_truncated_file_is_refused(folder, bytes_left):
    path = folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with refused(folder, "data_batch_3", ""):
        cifar10.read_cifar10(folder)


@pytest.mark.parametrize("name", [*cifar10.BATCHES, cifar10.META])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with refused(folder, name, "it is missing"):
        cifar10.read_cifar10(folder)


def foreign_contents():
    planes, labels = random_batch(0)
    return {
        "it holds a list": pickle.dumps([1, 2], 2),
        "its data is not a uint8 array": pickle.dumps({b"fine_labels": labels}, 2),
        r"its data is not a uint8 array of shape \(10, 3072\)": python2_batch(planes[:5], labels),
        "its labels are not a list of 10 integers": python2_batch(planes, labels[:5]),
        "its labels are not a list of 10 integers from 0 to 9": python2_batch(planes, [99] * N),
        "an array of b'f4', not of uint8": python2_batch(planes, labels, dtype=b"f4"),
        "": b"<html>404 not found</html>",
    }


@pytest.mark.parametrize("reason", foreign_contents())
def test_a_file_of_something_else_is_refused(folder, reason):
    (folder / "data_batch_1").write_bytes(foreign_contents()[reason])
    with refused(folder, "data_batch_1", reason):
        cifar10.read_cifar10(folder)


def test_an_array_shorter_than_it_says_is_refused(folder):
    planes, labels = random_batch(0)
    raw = python2_batch(planes, labels).replace(python2_string(planes.tobytes()), python2_string(planes.tobytes()[:-1]))
    (folder / "data_batch_1").write_bytes(raw)
    with refused(folder, "data_batch_1", "it holds 30719 bytes for an array of shape"):
        cifar10.read_cifar10(folder)


@pytest.mark.parametrize("content", ["a" * N * 3072, [0] * N * 3072], ids=["str", "list"])
def test_an_array_not_made_of_bytes_is_refused(folder, content):
    planes, labels = random_batch(0)
    _, rest = python2_batch(planes, labels).split(python2_string(planes.tobytes()))
    (folder / "data_batch_1").write_bytes(
        python2_batch(planes, labels)[: -len(rest) - len(python2_string(planes.tobytes()))]
        + pickle.dumps(content, 2)[2:-1]  # without the mark of the protocol and the end
        + rest
    )
    with refused(folder, "data_batch_1", f"made of a {type(content).__name__} instead of bytes"):
        cifar10.read_cifar10(folder)


def test_the_classes_of_another_data_set_are_refused(folder):
    (folder / cifar10.META).write_bytes(python2_meta(("apple", "baby")))
    with refused(folder, cifar10.META, "its classes are .*apple"):
        cifar10.read_cifar10(folder)
