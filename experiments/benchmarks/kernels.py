"""Kernels of a compiled program, and the bytes they move in device memory, read from the text of its optimised HLO.

Conventions: what a step usually executes is counted. Of a conditional that is branch 0 (the false one); the other
branches are counted apart, as rare. A loop counts as often as XLA knows that it runs, and one whose number of turns is
unknown does not count. A kernel moves each distinct operand once and its result once, but not arrays that lie in
another memory space than 0, such as a TPU's on-chip memory. Of an operand from which it only cuts slices, it moves the
slices. Asynchronous copies between memories are not kernels; their bytes are counted apart.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Instructions that name, group or reinterpret arrays, and execute nothing.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
SLICES = {"dynamic-slice", "gather", "slice"}
SAME_ELEMENTS = {"bitcast", "convert", "copy", "reshape"}
NOTHING = re.compile('custom_call_target="(AllocateBuffer|ConcatBitcast)"')  # reserves memory, or names it
_HEADER = re.compile(r"(?P<entry>ENTRY\s+)?%?(?P<name>[\w.-]+)\s.*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT\s+)?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+?(\d+)\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_NAME = re.compile(r"%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


class Array(NamedTuple):
    """One array of an instruction's result."""

    elements: int
    bits: int
    on_chip: bool

    @property
    def size(self) -> int:
        """Bytes, wherever the array lies."""
        return math.ceil(self.elements * self.bits / 8)

    @property
    def moved(self) -> int:
        """Bytes in device memory; 0 for an array on the chip."""
        return 0 if self.on_chip else self.size


class Instruction(NamedTuple):
    """A line of a computation: name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool

    def arrays(self) -> list[Array]:
        """Returns the arrays of the result."""
        return arrays(self.shape)

    def called(self, key: str) -> str | None:
        """Returns the computation that an attribute names, such as "body"."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return found and found[1]

    def branches(self) -> list[str]:
        """Returns the computations of a conditional, by index."""
        if listed := _BRANCHES.search(self.attributes):
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        return [self.called("false_computation"), self.called("true_computation")]


@dataclass
class Count:
    """What a program usually executes, and what it executes rarely."""

    kernels: int = 0
    bytes: int = 0
    copied: int = 0
    """Bytes in device memory of asynchronous copies from and to the chip."""
    conditionals: int = 0
    whiles: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    """Bytes that a device hands over."""
    rare: "Count | None" = field(default=None, repr=False)
    """What the other branches of the conditionals hold."""


def count(text: str) -> Count:
    """Returns what a program executes.

    Args:
      text: optimised HLO, as `jax.stages.Compiled.as_text` gives it.

    Raises:
      ValueError: there is no ENTRY computation in it.
    """
    program = Program(text)
    counted = Count(rare=Count())
    program.add(program.entry, counted, counted.rare, 1)
    return counted


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape, which HLO writes as `f32[8,3]{1,0}`, or several in parentheses."""
    found = []
    for dtype, bits, sizes, layout in _ARRAY.findall(shape):
        elements = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        bits = _BITS[dtype] if dtype in _BITS else int(bits)
        found.append(Array(elements, bits, re.search(r"S\([1-9]", layout) is not None))
    return found


class Program:
    """The computations of a compiled program.

    Attributes:
      computations: by name, the instructions by name.
      entry: name of the computation where execution begins.
    """

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        if self.entry is None:
            raise ValueError("the program has no ENTRY computation; give the text of optimised HLO.")

    def add(self, name: str, usual: Count, rare: Count, times: int) -> None:
        """Adds what a computation executes.

        Args:
          name: of the computation.
          usual: is added to.
          rare: gets what stands in branches other than 0.
          times: how often the computation runs.
        """
        for instruction in self.computations[name].values():
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith(("-done", "-update")) or NOTHING.search(instruction.attributes):
                continue
            if opcode == "conditional":
                usual.conditionals += times
                first, *others = instruction.branches()
                self.add(first, usual, rare, times)
                for branch in others:
                    self.add(branch, rare, rare, times)
            elif opcode == "while":
                usual.whiles += times
                turns = _TURNS.search(instruction.attributes)
                self.add(instruction.called("body"), usual, rare, times * int(turns[1]) if turns else 0)
            elif opcode == "call":
                self.add(instruction.called("to_apply"), usual, rare, times)
            else:
                self._add_kernel(name, instruction, usual, times)

    def _add_kernel(self, name, instruction, usual, times):
        """Adds one instruction that executes something of its own."""
        does = {instruction.opcode.removesuffix("-start")} | self._inside(instruction)
        operands = [self.computations[name][each] for each in dict.fromkeys(instruction.operands)]
        if any(opcode.startswith(COLLECTIVES) for opcode in does):
            usual.collectives += times
            usual.collective_bytes += times * sum(array.size for operand in operands for array in operand.arrays())
        elif instruction.opcode.endswith("-start"):
            result, source = instruction.arrays(), operands[0].arrays()[0]
            # A copy's result is (target, source, context); of other starts it is ((operands), target, context).
            target = result[0 if instruction.opcode == "copy-start" else len(operands)]
            usual.copied += times * (target.moved + (0 if source.on_chip else target.size))
        else:
            usual.kernels += times
            read = sum(self._read(instruction, operand) for operand in operands)
            usual.bytes += times * (read + sum(array.moved for array in instruction.arrays()))

    def _inside(self, instruction):
        """The opcodes of the computation that a fusion or an asynchronous start wraps."""
        if instruction.opcode not in ("fusion", "async-start"):
            return set()
        return {each.opcode for each in self.computations[instruction.called("calls")].values()}

    def _read(self, instruction, operand):
        """The bytes in device memory that a kernel reads of an operand."""
        return min(sum(array.moved for array in operand.arrays()), self._cut(instruction, operand, operand.arrays()))

    def _cut(self, instruction, operand, of):
        """The bytes that an instruction reads of an operand, which are those of the slices where it only cuts slices.

        Args:
          instruction: has the operand.
          operand: as it comes in, perhaps reshaped or converted.
          of: the arrays in memory.
        """
        whole = sum(array.moved for array in of)
        places = [index for index, name in enumerate(instruction.operands) if name == operand.name]
        if len(of) != 1:
            return whole
        if instruction.opcode in SLICES and places == [0]:
            return sum(array.elements for array in instruction.arrays()) * of[0].bits // 8 if whole else 0
        if inner := instruction.called({"fusion": "calls", "call": "to_apply"}.get(instruction.opcode, "none")):
            return sum(self._used(inner, self._parameter(inner, index), of) for index in places)
        return whole

    def _used(self, name, value, of):
        """The bytes that all uses of a value in a computation read."""
        if value.root:
            return sum(array.moved for array in of)
        read = 0
        for use in self.computations[name].values():
            if value.name in use.operands:
                again = use.opcode in SAME_ELEMENTS
                read += self._used(name, use, of) if again else self._cut(use, value, of)
        return read

    def _parameter(self, name, index):
        """The parameter of a computation at an index."""
        return next(
            each for each in self.computations[name].values() if each.opcode == "parameter" and int(each.text) == index
        )


def _parse(text):
    """The instructions of each computation by their names, and the name of the one where execution begins."""
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if line.startswith("}"):
            name = None
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found["name"], found["rest"], bool(found["root"]))
            computations[name][instruction.name] = instruction
        elif not line.startswith((" ", "HloModule")) and (found := _HEADER.match(line)):
            name = found["name"]
            computations[name] = {}
            entry = name if found["entry"] else entry
    return computations, entry


def _instruction(name, rest, root):
    """The parts of `shape opcode(operands), attributes`."""
    shape, rest = _split(rest, " ")
    opcode, rest = rest.split("(", 1)
    inside, attributes = _split(rest, ")")
    return Instruction(name, shape, opcode.strip(), tuple(_NAME.findall(inside)), inside, attributes, root)


def _split(text, end):
    """The text before and after a character that stands outside of all brackets."""
    depth = 0
    for index, letter in enumerate(text):
        if letter == end and not depth:
            return text[:index], text[index + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
    return text, ""
