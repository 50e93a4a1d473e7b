"""Instructions from nvdisasm's text: opcode, guard, operands, where branches go."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

BYTES = 16  # of an instruction
LINE = re.compile(r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<text>.*?)\s*;")
LABEL = re.compile(r"^(?P<name>[.$]\S+|_Z\w+):")
GUARD = re.compile(r"^@(?P<not>!?)(?P<name>U?P[0-9T])\s+")
REGISTER = re.compile(
    r"^(?P<negated>-?)(?P<inverted>~?)(?P<absolute>\|?)(?P<name>UR\d+|URZ|R\d+|RZ)"
    r"(?:\.(?P<part>H0_H0|H1_H1|H0|H1|B[0-3]|64|X\d+))?\|?$"
)
PREDICATE = re.compile(r"^(?P<not>!?)(?P<name>U?P[0-9T])$")
CONSTANT = re.compile(
    r"^(?P<negated>-?)(?P<inverted>~?)(?P<absolute>\|?)c\[0x0\]\[(?P<at>[^\]]+)\]\|?$"
)
INTEGER = re.compile(r"^-?0x[0-9a-f]+$")
ZERO = 255  # the register that reads as zero; UR63 likewise
UNIFORM_ZERO = 63
TRUE = 7  # the predicate that is always true


@dataclass(frozen=True)
class Operand:
    """What an instruction reads or writes.

    Attributes:
        kind: ``"R"``, ``"UR"``, ``"P"``, ``"UP"``, ``"c"``, ``"int"``, ``"float"``, ``"mem"``,
            ``"label"`` or ``"name"``.
        index: Register or predicate; byte of the constant bank or offset; or the integer.
        value: A floating-point immediate.
        negated: A minus in front; of predicates, a ``!``.
        inverted: A ``~`` in front.
        absolute: Between bars.
        part: What follows a dot: a half, a byte, ``64``.
        base: Of memory: the register that holds the address.
        uniform: Of memory: the uniform register that is added.
        text: As it was printed.
    """

    kind: str
    index: int = 0
    value: float = 0.0
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    part: str = ""
    base: Operand | None = None
    uniform: Operand | None = None
    text: str = ""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        at: Its number in the kernel.
        text: As it was printed, for messages.
        name: The opcode without its modifiers.
        modifiers: They.
        guard: The predicate under which it runs.
        operands: In order.
        target: Number of the instruction that its label stands before.
    """

    at: int
    text: str
    name: str
    modifiers: tuple[str, ...]
    guard: Operand | None
    operands: tuple[Operand, ...]
    target: int | None = None

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))


def register_number(name: str) -> int:
    """The number in ``R5``, ``UR5``, ``P5``; of RZ, URZ and PT what stands for them."""
    digits = name.lstrip("URP")
    if digits == "T":
        return TRUE
    if digits == "Z":
        return UNIFORM_ZERO if name.startswith("U") else ZERO
    return int(digits)


def _number(text: str) -> float:
    return float(text.lower().replace("qnan", "nan").replace("snan", "nan"))


def _memory(text: str) -> Operand:
    """``[R2.64+0x10]``, ``[UR4+R2+-0x8]`` or ``[R2+URZ]``; descriptors are dropped before."""
    base = uniform = None
    offset = 0
    for part in text.strip("[]").split("+"):
        if INTEGER.match(part):
            offset += int(part, 16)
        else:
            found = operand(part)
            if found.kind == "UR":
                uniform = found
            elif found.kind == "R" and base is None:
                base = found
            else:
                raise ValueError(f"an address of another form: {text}")
    return Operand("mem", index=offset, base=base, uniform=uniform, text=text)


@functools.cache
def operand(text: str) -> Operand:
    """Decodes one operand.

    Raises:
        ValueError: It has a form that is not known.
    """
    text = text.strip().replace(".reuse", "")
    if match := REGISTER.match(text):
        return Operand(
            "UR" if match["name"].startswith("U") else "R", register_number(match["name"]),
            negated=bool(match["negated"]), inverted=bool(match["inverted"]),
            absolute=bool(match["absolute"]), part=match["part"] or "", text=text,
        )  # fmt: skip
    if match := PREDICATE.match(text):
        kind = "UP" if match["name"].startswith("U") else "P"
        number = register_number(match["name"])
        return Operand(kind, number, negated=bool(match["not"]), text=text)
    if match := CONSTANT.match(text):
        flags = {key: bool(match[key]) for key in ("negated", "inverted", "absolute")}
        if not INTEGER.match(match["at"]):
            raise ValueError(f"a constant at a place that is not known: {text}")
        return Operand("c", int(match["at"], 16), text=text, **flags)
    if INTEGER.match(text):
        return Operand("int", int(text, 16) & 0xFFFFFFFF, text=text)
    if text.startswith("["):
        return _memory(text)
    if text.startswith("desc["):
        return _memory(text[text.index("]") + 1 :])
    if text.startswith("`"):
        return Operand("label", text=text[2:-1])
    if re.match(r"^[A-Z][A-Za-z0-9_.]*$", text) and not re.match(r"^(INF|QNAN)$", text):
        return Operand("name", text=text)  # B0, PR, SR_TID.X, SRZ
    try:
        return Operand("float", value=_number(text), text=text)
    except ValueError:
        raise ValueError(f"an operand of a form that is not known: {text}") from None


def instruction(at: int, text: str) -> Instruction:
    """Decodes one line, without what its label stands for."""
    rest, guard = text, None
    if match := GUARD.match(text):
        kind = "UP" if match["name"].startswith("U") else "P"
        guard = Operand(kind, register_number(match["name"]), negated=bool(match["not"]))
        rest = text[match.end() :]
    opcode, _, arguments = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    try:
        # Labels may hold anything but a parenthesis that isn't theirs.
        parts = [part for part in re.split(r",\s*|\s+(?=`)", arguments) if part.strip()]
        operands = tuple(operand(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"instruction {at:#x}: {text}: {error}") from None
    return Instruction(at, text, name, tuple(modifiers), guard, operands)


def decode(text: str) -> list[Instruction]:
    """All instructions of a kernel; raises ValueError on what it does not understand."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match["name"]] = len(found)
        elif match := LINE.match(line):
            at = int(match["at"], 16) // BYTES
            if at != len(found):
                raise ValueError(f"instruction {at} where {len(found)} was expected: {line}")
            found.append(instruction(at, match["text"]))
    return [_resolved(one, labels) for one in found]


def _resolved(one: Instruction, labels: dict[str, int]) -> Instruction:
    for operand in one.operands:
        if operand.kind == "label":
            if operand.text not in labels:
                raise ValueError(f"no label {operand.text}: {one.text}")
            return Instruction(
                one.at, one.text, one.name, one.modifiers, one.guard, one.operands,
                labels[operand.text],
            )  # fmt: skip
    return one
