"""Collectives in compiled programs.

Convention: a program is the text of its HLO. Those inside a branch are counted apart from those that every step
executes.
"""

import math
import re
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
      bytes: of its result on one device; of an all-reduce, that is also what the device hands over.
      conditional: whether it stands in a branch of a conditional.
    """

    name: str
    bytes: int
    conditional: bool


def collectives(compiled: str) -> list[Collective]:
    """Returns the collectives of a compiled program, given as the text of its HLO."""
    computations, entry = _computations(compiled)

    def walk(name, conditional):
        found = []
        for line in computations[name]:
            if instruction := _INSTRUCTION.search(line):
                found.append(Collective(instruction["name"], _bytes(instruction["shape"]), conditional))
            elif branches := _BRANCHES.search(line):
                listed = branches[1].split(",") if branches[1] else branches.groups()[1:]
                seldom = conditional or len(listed) > 1  # one branch alone is always taken
                found += [c for branch in listed for c in walk(branch.strip().lstrip("%"), seldom)]
            else:
                found += [c for called in _CALLED.findall(line) for c in walk(called, conditional)]
        return found

    return walk(entry, False)


def executed(found: list[Collective]) -> list[Collective]:
    """Returns the collectives that every step executes."""
    return [collective for collective in found if not collective.conditional]


def executed_bytes(found: list[Collective]) -> int:
    """Returns the bytes of the collectives that every step executes."""
    return sum(collective.bytes for collective in executed(found))


def _computations(text):
    """The lines of each computation by its name, and the name of the one where execution begins."""
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


def _bytes(shape):
    """The size of an array or of a tuple of arrays, as HLO writes their types."""
    return sum(
        math.prod(map(int, filter(None, sizes.split(",")))) * int(bits or 8) // 8
        for bits, sizes in _ARRAY.findall(shape)
    )
