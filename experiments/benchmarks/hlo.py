"""Collectives in compiled programs.

Conventions: a program is the text of its HLO. Collectives inside a branch are told apart from those that every step
executes. `kernels.py` parses whole programs; this module needs much less, and its text may come from any platform.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_NAMES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<name>{_NAMES})(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)")
_ARRAY = re.compile(r"[a-z]+(\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
      name: XLA's name of the operation.
      bytes: size of its result on one device; for an all-reduce, this is also the size of its operand.
      conditional: whether it is in a branch of a conditional.
    """

    name: str
    bytes: int
    conditional: bool


def collectives(compiled: str) -> list[Collective]:
    """Returns the collectives of a compiled program in the order of execution."""
    computations, entry = _computations(compiled)

    def walk(name: str, conditional: bool) -> Iterator[Collective]:
        for line in computations[name]:
            if instruction := _INSTRUCTION.search(line):
                yield Collective(instruction["name"], _bytes(instruction["shape"]), conditional)
            elif match := _BRANCHES.search(line):
                # A conditional on an index lists its branches; one on a predicate names two computations.
                branches = match[1].split(",") if match[1] else match.groups()[1:]
                for branch in branches:
                    # A conditional with a single branch always takes it.
                    yield from walk(branch.strip().lstrip("%"), conditional or len(branches) > 1)
            else:
                for called in _CALLED.findall(line):
                    yield from walk(called, conditional)

    return list(walk(entry, False))


def executed(all_collectives: list[Collective]) -> list[Collective]:
    """Returns the collectives that every step executes."""
    return [collective for collective in all_collectives if not collective.conditional]


def executed_bytes(all_collectives: list[Collective]) -> int:
    """Returns the bytes of the collectives that every step executes."""
    return sum(collective.bytes for collective in executed(all_collectives))


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Splits a program into the lines of each computation, and finds the name of the entry computation."""
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = None
        elif name:
            computations[name].append(line)
    return computations, entry


def _bytes(shape: str) -> int:
    """Returns the size of an array, or of a tuple of arrays, from the text of its type."""
    total = 0
    for bits, sizes in _ARRAY.findall(shape):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        total += elements * int(bits or 8) // 8  # `pred` has no number of bits, and takes a byte
    return total
