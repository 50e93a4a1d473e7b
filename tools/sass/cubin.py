"""Machine code of kernels out of nvcc's objects: text, parameters, shared memory."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = 90
PARAMETERS = 0x210  # where they begin in constant bank 0 of this architecture
KPARAM_INFO = 0x17  # place and size of one parameter, in .nv.info of a kernel
SIZED_VALUE = 0x04  # the format of records that carry their size


@dataclass(frozen=True)
class Kernel:
    """A kernel's code and what a launch must know.

    Attributes:
        name: Its symbol.
        text: Lines of nvdisasm.
        parameters: Place (from ``PARAMETERS``) and size of each.
        shared: Bytes of static shared memory.
    """

    name: str
    text: str
    parameters: tuple[tuple[int, int], ...]
    shared: int


def tool(name: str) -> Path:
    """``nvdisasm`` or ``cuobjdump``, as the wheels of the extra ``dev`` bring them."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    path = found[0] if found else shutil.which(name)
    if path is None:
        raise SystemExit(f"pydist: {name} was not found; pip install -e '.[dev]' brings it")
    return Path(path)


# --------------------------------------------------------------------------- ELF


def _sections(image: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of every section."""
    table, entry, count, names = (
        struct.unpack_from("<Q", image, 40)[0], *struct.unpack_from("<HHH", image, 58),
    )  # fmt: skip
    headers = [struct.unpack_from("<IIQQQQ", image, table + entry * i) for i in range(count)]
    text = headers[names][4]

    def name(at: int) -> str:
        return image[text + at : image.index(b"\0", text + at)].decode()

    return {name(header[0]): (header[4], header[5]) for header in headers}


def _symbols(image: bytes, sections: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The index of every symbol."""
    (at, size), (text, _) = sections[".symtab"], sections[".strtab"]
    found = {}
    for index in range(size // 24):
        name = text + struct.unpack_from("<I", image, at + 24 * index)[0]
        found[image[name : image.index(b"\0", name)].decode()] = index
    return found


def _records(image: bytes, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
    end = offset + size
    while offset < end:
        kind, attribute, value = struct.unpack_from("<BBH", image, offset)
        offset += 4
        if kind == SIZED_VALUE:
            yield attribute, image[offset : offset + value]
            offset += value


def _parameters(image: bytes, section: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    found = {}
    for attribute, value in _records(image, *section):
        if attribute == KPARAM_INFO:
            _, ordinal, place, rest = struct.unpack("<IHHI", value)
            found[ordinal] = (place, rest >> 18)
    return tuple(found[i] for i in range(len(found)))


# --------------------------------------------------------------------------- disassembly


def extract(objects: Iterable[Path]) -> Iterator[Path]:
    """The cubin of each object, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        for made in objects:
            command = [tool("cuobjdump"), "-xelf", f"sm_{ARCHITECTURE}.cubin", made.resolve()]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        yield from sorted(Path(folder).glob("*.cubin"))


class Cubins:
    """The kernels of many objects, disassembled when they are asked for."""

    def __init__(self, objects: Iterable[Path]) -> None:
        self._images: dict[str, bytes] = {}  # of the cubin that holds a kernel
        self._found: dict[str, Kernel] = {}
        for path in extract(objects):
            image = path.read_bytes()
            for name in _sections(image):
                if name.startswith(".text."):
                    self._images[name.removeprefix(".text.")] = image

    def __getitem__(self, name: str) -> Kernel:
        if name not in self._found:
            if name not in self._images:
                raise SystemExit(
                    f"pydist: the objects hold no code of {name} for sm_{ARCHITECTURE}"
                )
            self._found[name] = self._disassemble(name)
        return self._found[name]

    def _disassemble(self, name: str) -> Kernel:
        image = self._images[name]
        sections = _sections(image)
        index = _symbols(image, sections)[name]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(image)
            file.flush()
            command = [tool("nvdisasm"), "-c", "-fun", str(index), file.name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        parameters = _parameters(image, sections[f".nv.info.{name}"])
        shared = sections.get(f".nv.shared.{name}", (0, 0))[1]
        return Kernel(name, done.stdout, parameters, shared)
