"""Counts the kernels of a compiled program and the bytes they move in device memory, from its optimized HLO text.

Conventions: the counts are those of a usual step. For a conditional, that is branch 0 (the false one); the other
branches are counted separately, as rare. The body of a loop counts once per iteration if XLA knows their number, and
not at all otherwise. A kernel moves each distinct operand once and its result once, except for arrays outside of memory
space 0, such as a TPU's on-chip memory. If it only cuts slices from an operand, it moves the slices. Asynchronous
copies between memories are not kernels; their bytes are counted separately.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Instructions that name, group or reinterpret arrays, and run no kernel.
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
# Custom calls that reserve memory or name it, and run no kernel.
NOTHING = re.compile('custom_call_target="(AllocateBuffer|ConcatBitcast)"')
# A computation:  ENTRY %main (x: f32[8]) -> f32[8] {
_HEADER = re.compile(r"(?P<entry>ENTRY\s+)?%?(?P<name>[\w.-]+)\s.*\{$")
# An instruction:  ROOT %y = f32[8]{0} multiply(%x, %x), metadata={...}
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT\s+)?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
# An array:  bf16[8,3]{1,0:T(8,128)S(1)}, with layout, tiling and memory space in braces
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+?(\d+)\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_NAME = re.compile(r"%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ITERATIONS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


class Array(NamedTuple):
    """One array of an instruction's result."""

    elements: int
    bits: int
    on_chip: bool

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.ceil(self.elements * self.bits / 8)

    @property
    def moved(self) -> int:
        """Bytes moved in device memory to read or write it once; 0 for an array on the chip."""
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
        """Returns the computation named by an attribute, such as "body"."""
        match = re.search(rf"\b{key}=%?([\w.-]+)", self.attributes)
        return match and match[1]

    def branches(self) -> list[str]:
        """Returns the computations of a conditional by index; false is 0."""
        if listed := _BRANCHES.search(self.attributes):
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        return [self.called("false_computation"), self.called("true_computation")]


@dataclass
class Count:
    """Counts of a usual step, and of the rare branches."""

    kernels: int = 0
    bytes: int = 0
    copied: int = 0
    """Bytes in device memory moved by asynchronous copies from and to the chip."""
    conditionals: int = 0
    whiles: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    """Bytes of the operands on one device."""
    rare: "Count | None" = field(default=None, repr=False)
    """Counts of the other branches of all conditionals."""


def count(text: str) -> Count:
    """Counts kernels, bytes and collectives of a program.

    Args:
      text: optimized HLO, from `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    program = Program(text)
    usual = Count(rare=Count())
    program.add(program.entry, usual, usual.rare, 1)
    return usual


def arrays(shape: str) -> list[Array]:
    """Parses a shape: one array such as `f32[8,3]{1,0}`, or several in parentheses."""
    parsed = []
    for dtype, bits, sizes, layout in _ARRAY.findall(shape):
        # `<=` marks the bound of a dynamic size.
        elements = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        bits = _BITS[dtype] if dtype in _BITS else int(bits)
        on_chip = re.search(r"S\([1-9]", layout) is not None
        parsed.append(Array(elements, bits, on_chip))
    return parsed


class Program:
    """The computations of a compiled program.

    Attributes:
      computations: name of a computation -> name of an instruction -> Instruction.
      entry: name of the computation where execution begins.
    """

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        if self.entry is None:
            raise ValueError("the program has no ENTRY computation; pass the text of optimized HLO.")

    def add(self, name: str, usual: Count, rare: Count, times: int) -> None:
        """Adds the instructions of a computation to the counts, and those of the computations it calls.

        Args:
          name: name of the computation.
          usual: counts of what the computation runs.
          rare: counts of branches other than 0.
          times: how often the computation runs.
        """
        for instruction in self.computations[name].values():
            opcode = instruction.opcode
            # An asynchronous operation is counted where it starts.
            if opcode in FREE or opcode.endswith(("-done", "-update")) or NOTHING.search(instruction.attributes):
                continue
            if opcode == "conditional":
                usual.conditionals += times
                usual_branch, *rare_branches = instruction.branches()
                self.add(usual_branch, usual, rare, times)
                for branch in rare_branches:
                    self.add(branch, rare, rare, times)
            elif opcode == "while":
                usual.whiles += times
                iterations = _ITERATIONS.search(instruction.attributes)
                self.add(instruction.called("body"), usual, rare, times * int(iterations[1]) if iterations else 0)
            elif opcode == "call":
                self.add(instruction.called("to_apply"), usual, rare, times)
            else:
                self._add_kernel(name, instruction, usual, times)

    def _add_kernel(self, name: str, instruction: Instruction, usual: Count, times: int) -> None:
        """Adds an instruction that is not control flow: a collective, an asynchronous copy, or a kernel."""
        # A fusion or an asynchronous start may wrap a collective.
        opcodes = {instruction.opcode.removesuffix("-start")} | self._wrapped_opcodes(instruction)
        operands = [self.computations[name][operand] for operand in dict.fromkeys(instruction.operands)]
        if any(opcode.startswith(COLLECTIVES) for opcode in opcodes):
            usual.collectives += times
            usual.collective_bytes += times * sum(array.size for operand in operands for array in operand.arrays())
        elif instruction.opcode.endswith("-start"):
            result, source = instruction.arrays(), operands[0].arrays()[0]
            # A copy-start returns (target, source, context), other starts return ((operands), target, context).
            target = result[0 if instruction.opcode == "copy-start" else len(operands)]
            read = 0 if source.on_chip else target.size  # a slice-start reads only the slice
            usual.copied += times * (read + target.moved)
        else:
            read = sum(self._bytes_read(instruction, operand) for operand in operands)
            written = sum(array.moved for array in instruction.arrays())
            usual.kernels += times
            usual.bytes += times * (read + written)

    def _wrapped_opcodes(self, instruction: Instruction) -> set[str]:
        """Returns the opcodes inside a fusion or an asynchronous start."""
        if instruction.opcode not in ("fusion", "async-start"):
            return set()
        return {inner.opcode for inner in self.computations[instruction.called("calls")].values()}

    def _bytes_read(self, kernel: Instruction, operand: Instruction) -> int:
        """Returns the bytes of an operand that a kernel reads in device memory."""
        # Slices may overlap, but the kernel reads the operand at most once.
        whole = sum(array.moved for array in operand.arrays())
        return min(whole, self._read_by(kernel, operand, operand.arrays()))

    def _read_by(self, instruction: Instruction, value: Instruction, stored: list[Array]) -> int:
        """Returns the bytes that an instruction reads of a value: those of the slices, if it only cuts slices.

        Args:
          instruction: has the value as an operand.
          value: the operand, perhaps reshaped or converted after it was read.
          stored: the arrays in memory that the value comes from.
        """
        whole = sum(array.moved for array in stored)
        if len(stored) != 1:
            return whole
        positions = [index for index, name in enumerate(instruction.operands) if name == value.name]
        # Operand 0 is the array; the others of a dynamic-slice or gather are indices.
        if instruction.opcode in SLICES and positions == [0]:
            elements = sum(array.elements for array in instruction.arrays())
            # The slice may have been converted, so count in the bits of the stored array.
            return elements * stored[0].bits // 8 if whole else 0
        if inner := instruction.called({"fusion": "calls", "call": "to_apply"}.get(instruction.opcode, "none")):
            return sum(self._read_by_uses(inner, self._parameter(inner, index), stored) for index in positions)
        return whole

    def _read_by_uses(self, name: str, value: Instruction, stored: list[Array]) -> int:
        """Returns the bytes that all uses of a value in a computation read."""
        if value.root:
            return sum(array.moved for array in stored)
        read = 0
        for use in self.computations[name].values():
            if value.name in use.operands:
                if use.opcode in SAME_ELEMENTS:
                    read += self._read_by_uses(name, use, stored)
                else:
                    read += self._read_by(use, value, stored)
        return read

    def _parameter(self, name: str, index: int) -> Instruction:
        """Returns a parameter of a computation."""
        parameters = (i for i in self.computations[name].values() if i.opcode == "parameter")
        return next(parameter for parameter in parameters if int(parameter.text) == index)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str | None]:
    """Parses a program into its computations, and finds the name of the entry computation."""
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        if line.startswith("}"):
            name = None
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match["name"], match["rest"], bool(match["root"]))
            computations[name][instruction.name] = instruction
        elif not line.startswith((" ", "HloModule")) and (match := _HEADER.match(line)):
            name = match["name"]
            computations[name] = {}
            entry = name if match["entry"] else entry
    return computations, entry


def _parse_instruction(name: str, rest: str, root: bool) -> Instruction:
    """Parses `shape opcode(operands), attributes`."""
    shape, rest = _split(rest, " ")
    opcode, rest = rest.split("(", 1)
    inside, attributes = _split(rest, ")")
    return Instruction(name, shape, opcode.strip(), tuple(_NAME.findall(inside)), inside, attributes, root)


def _split(text: str, end: str) -> tuple[str, str]:
    """Splits a text at the first `end` outside of all brackets."""
    depth = 0
    for index, letter in enumerate(text):
        if letter == end and depth == 0:
            return text[:index], text[index + 1 :]
        depth += (letter in "([{") - (letter in ")]}")
    return text, ""
