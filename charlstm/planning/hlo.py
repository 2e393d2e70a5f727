"""Read the text of a program that XLA has compiled: its loops, arrays and collectives.

The text is that of jax.stages.Compiled.as_text(). It consists of computations, one of which is the
entry. An instruction `%name = type opcode(operands), attributes` may call other computations, as a
loop calls its body. The type of an array ends with its layout, in which S(n) is the memory that the
compiler has chosen for it; without S(n) it is the main memory of the device.
"""

import math
import re
from typing import NamedTuple

# Of a TPU: https://openxla.org/xla/tiled_layout, and CMEM as the programs for a v4 show.
MEMORIES = {0: "HBM", 1: "VMEM", 3: "CMEM"}
ON_CHIP = ("VMEM", "CMEM")
COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
_WITHOUT_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_ELEMENT = re.compile(r"get-tuple-element\(.*?%([\w.-]+)\), index=(\d+)")


class Array(NamedTuple):
    """The type of an array, and the memory that holds it."""

    dtype: str  # such as bf16
    shape: tuple[int, ...]
    memory: str  # a name of MEMORIES, or S(n)

    @property
    def num_bytes(self) -> int:
        """The bytes of its elements, without padding."""
        bits = re.search(r"\d+", self.dtype)
        width = max(1, int(bits[0]) // 8) if bits else 1  # of pred, 1
        return width * math.prod(self.shape)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    is_root: bool
    arrays: tuple[Array, ...]  # of its result
    opcode: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """A communication of the devices."""

    opcode: str
    arrays: tuple[Array, ...]  # that it returns
    loops: int  # the number of loops that contain it

    @property
    def num_bytes(self) -> int:
        """The bytes of its result on each device."""
        return sum(array.num_bytes for array in self.arrays)


class Loop(NamedTuple):
    """A while loop."""

    op_name: str  # of JAX, such as jit(f)/jvp(Model)/while
    constants: tuple[Array, ...]  # arrays that all iterations read and none changes
    loops: int  # the number of loops that contain it
    is_innermost: bool
    operations: int  # of its body, each of which computes or copies arrays


class Program(NamedTuple):
    """The computations of a program by name, and the name of its entry."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


def parse(text: str) -> Program:
    """Return the program of `text`; raise ValueError if it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            found = _instruction(line)
            if current and found:
                computations[current].append(found)
        elif line.endswith("{") and "->" in line:
            is_entry = line.startswith("ENTRY ")
            current = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = current if is_entry else entry
            computations[current] = []
    if not entry:
        raise ValueError("text: has no line that begins with ENTRY")
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry)


def _instruction(line: str) -> Instruction | None:
    """Return the instruction of a line, None for a line without one."""
    if not (match := _INSTRUCTION.match(line)):
        return None
    root, name, right = match.groups()
    end = _end_of_type(right)
    opcode, _, rest = right[end:].strip().partition("(")
    return Instruction(name, bool(root), arrays_of(right[:end]), opcode, f"({rest}")


def _end_of_type(right: str) -> int:
    """Return the length of the type at the beginning of `right`, which may be a tuple."""
    if not right.startswith("("):
        return right.index(" ") if " " in right else len(right)
    depth = 0
    for index, character in enumerate(right):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    return len(right)


def arrays_of(type_text: str) -> tuple[Array, ...]:
    """Return the arrays of a type such as (f32[], bf16[2,3]{1,0:T(8,128)S(1)})."""
    return tuple(_array(*match.groups()) for match in _ARRAY.finditer(type_text))


def _array(dtype: str, shape: str, layout: str | None) -> Array:
    space = re.search(r"S\((\d+)\)", layout or "")
    number = int(space[1]) if space else 0
    sizes = tuple(int(size) for size in shape.split(",") if size)
    return Array(dtype, sizes, MEMORIES.get(number, f"S({number})"))


def walk(program: Program) -> list[tuple[Instruction, int]]:
    """Return every instruction that is reached from the entry, with the number of loops around it.

    A computation that is called from several places appears once, with the largest number.
    """
    depths: dict[str, int] = {}
    waiting = [(program.entry, 0)]
    while waiting:
        name, depth = waiting.pop()
        if name not in program.computations or depths.get(name, -1) >= depth:
            continue
        depths[name] = depth
        for instruction in program.computations[name]:
            inside = depth + (instruction.opcode == "while")
            waiting += [(called, inside) for called in called_by(instruction)]
    return [
        (instruction, depth)
        for name, depth in depths.items()
        for instruction in program.computations[name]
    ]


def called_by(instruction: Instruction) -> list[str]:
    """Return the names of the computations that an instruction calls."""
    names = [name for _, name in _CALLED.findall(instruction.rest)]
    if branches := _BRANCHES.search(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return names


def collectives(program: Program) -> list[Collective]:
    """Return the collectives, largest first; the two halves of an asynchronous one count once."""
    found: dict[tuple[str, str], Collective] = {}
    for instruction, depth in walk(program):
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in COLLECTIVES:
            continue
        channel = _CHANNEL.search(instruction.rest)
        arrays = instruction.arrays
        if opcode != instruction.opcode and opcode != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # the operands stand before the results
        key = opcode, channel[1] if channel else instruction.name
        if key not in found or found[key].loops < depth:
            found[key] = Collective(opcode, arrays, depth)
    return sorted(found.values(), key=lambda one: -one.num_bytes)


def loops(program: Program) -> list[Loop]:
    """Return the while loops, in no particular order."""
    found = []
    for instruction, depth in walk(program):
        if instruction.opcode != "while":
            continue
        called = dict(_CALLED.findall(instruction.rest))
        body = program.computations[called["body"]]
        constants = tuple(instruction.arrays[index] for index in _unchanged(body))
        op_name = _OP_NAME.search(instruction.rest)
        inside = walk(Program(program.computations, called["body"]))
        is_innermost = not any(other.opcode == "while" for other, _ in inside)
        operations = sum(line.opcode not in _WITHOUT_WORK for line in body)
        name = op_name[1] if op_name else ""
        found.append(Loop(name, constants, depth, is_innermost, operations))
    return found


def estimated_cycles(program: Program) -> int:
    """Return the compiler's estimate of the clock cycles of a program on a TPU.

    The body of a loop counts as often as it runs, or once if this is known at run time only.
    Collectives have no estimate and count 0. What is estimated is each operation alone.
    """
    return _cycles(program, program.entry)


def _cycles(program: Program, name: str) -> int:
    total = 0
    for instruction in program.computations.get(name, ()):
        if found := _CYCLES.search(instruction.rest):
            total += int(found[1])
        called = dict(_CALLED.findall(instruction.rest))
        if instruction.opcode == "while":
            runs = _iterations(program.computations[called["condition"]]) or 1
            total += runs * _cycles(program, called["body"])
        elif instruction.opcode == "call":
            total += _cycles(program, called["to_apply"])
        elif instruction.opcode == "conditional":
            total += max(_cycles(program, branch) for branch in called_by(instruction))
    return total


def _iterations(condition: tuple[Instruction, ...]) -> int | None:
    """Return n for the condition `index < n`, whose index begins at 0; None for any other."""
    constants = {
        line.name: int(number[1])
        for line in condition
        if line.opcode == "constant" and (number := re.match(r"\((\d+)\)", line.rest))
    }
    root, operands = _root(condition)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    return constants.get(operands[1])


def _unchanged(body: tuple[Instruction, ...]) -> list[int]:
    """Return the places of the loop's tuple that its body passes on as they are."""
    parameters = {line.name for line in body if line.opcode == "parameter"}
    places = {}
    for line in body:
        element = _ELEMENT.search(f"{line.opcode}{line.rest}")
        if element and element[1] in parameters:
            places[line.name] = int(element[2])
    _, operands = _root(body)
    return [place for place, name in enumerate(operands) if places.get(name) == place]


def _root(computation: tuple[Instruction, ...]) -> tuple[Instruction, list[str]]:
    """Return the instruction with the result of a computation, and the names of its operands."""
    (root,) = (line for line in computation if line.is_root)
    return root, re.findall(r"%([\w.-]+)", root.rest.split("), ")[0])
