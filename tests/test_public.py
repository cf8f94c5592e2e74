"""Public names, their signatures and the commands change only on purpose: `python -m tests.golden.make_public`."""

import json

import pytest

from tests.golden import make_public

pytest.importorskip("tyro")
WRITTEN = json.loads(make_public.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["names", "commands"])
def test_public_names_and_commands_are_those_written_down(kind):
    assert make_public.public()[kind] == WRITTEN[kind]
