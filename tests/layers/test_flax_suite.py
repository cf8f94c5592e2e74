"""Flax's own tests of batch norm pass with our layers in place of Flax's."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def flax_tests(tmp_path):
    """The tests of the installed version of Flax, which only its source distribution holds."""
    for needed in ("absl", "cloudpickle", "optax", "orbax.checkpoint"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"Flax's tests import {needed}, which is not installed")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "flax"]
    try:
        done = subprocess.run(
            [*download, "--dest", str(tmp_path), f"flax=={version('flax')}"],
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the source distribution of Flax did not arrive in five minutes")
    archives = list(tmp_path.glob("flax-*.tar.gz"))
    if not archives:
        pytest.skip(f"the source distribution of Flax cannot be had: {done.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        # Only the tests: the package next to them would be imported instead of the installed one.
        wanted = [member for member in archive.getmembers() if "/tests/" in member.name]
        archive.extractall(tmp_path, wanted, filter="data")
    return next(tmp_path.glob("flax-*/tests"))


def test_flaxs_tests_of_batch_norm_pass_with_our_layers(flax_tests):
    files = [path for path in sorted(flax_tests.rglob("*_test.py")) if "BatchNorm" in path.read_text()]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    options = ["-p", "flax_suite_plugin", "-p", "no:warnings", "-p", "no:cacheprovider", "-c", os.devnull, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(flax_tests), *map(str, files)],
        cwd=flax_tests,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert passed and int(passed[1]) >= 100, done.stdout[-500:]
