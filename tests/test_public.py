"""Public names, signatures and commands change only on purpose: `python -m tests.golden.make_public` records them."""

import json

import pytest

from tests.golden import make_public

pytest.importorskip("tyro")
WRITTEN = json.loads(make_public.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["names", "commands"])
def test_public_names_and_commands_are_the_recorded_ones(kind):
    assert make_public.public()[kind] == WRITTEN[kind]
