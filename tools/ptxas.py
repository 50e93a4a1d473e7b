"""`make ptxas`: registers, stack and spills of every CUDA kernel, per architecture; needs no GPU.

Builds the kernels with the flags of the package, prints what ptxas reports, and fails where a
kernel spills registers or has a stack frame in local memory. Ninja compiles what has changed; the
reports of the rest lie beside their objects.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
REPORT = ".ptxas"  # suffix of a report beside its object

REGISTERS_PER_SM = 65536
REGISTER_UNIT = 256  # registers are given to a warp in units of so many
# As the toolkit's cuda_occupancy.h has them.
BLOCKS_PER_SM = {75: 16, 80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24}
WARPS_PER_SM = {75: 32, 80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}
SHARED_KIB_PER_SM = {
    75: 64,
    80: 164,
    86: 100,
    87: 164,
    89: 100,
    90: 228,
    100: 228,
    103: 228,
    120: 100,
}
SHARED_RESERVED = 1024  # bytes of shared memory that each block takes for the system


@dataclass(frozen=True)
class Usage:
    """What one function takes on one architecture, in registers and bytes."""

    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0

    @property
    def bad(self) -> bool:
        return bool(self.stack or self.spill_stores or self.spill_loads)

    def blocks_per_sm(self, threads: int) -> int | None:
        """Blocks that fit a multiprocessor, as far as registers and static shared memory go."""
        if self.arch not in WARPS_PER_SM or not self.registers:
            return None
        warps = -(-threads // 32)
        a_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        limits = [BLOCKS_PER_SM[self.arch], WARPS_PER_SM[self.arch] // warps]
        limits.append(REGISTERS_PER_SM // a_warp // warps)
        limits.append(SHARED_KIB_PER_SM[self.arch] * 1024 // (self.shared + SHARED_RESERVED))
        return min(limits)


# --------------------------------------------------------------------------- what ptxas -v prints

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'")
FUNCTION = re.compile(r"Function properties for (?P<name>\w+)")
FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


def parse(report: str) -> list[Usage]:
    """The functions of a report; those that a kernel calls have no registers of their own."""
    found: dict[tuple[str, int], Usage] = {}
    arch, key = 0, None
    for line in report.splitlines():
        if match := ENTRY.search(line):
            arch = int(match["arch"])
        elif match := FUNCTION.search(line):
            key = (match["name"], arch)
            found[key] = Usage(*key)
        elif (match := FRAME.search(line) or USED.search(line)) and key:
            numbers = {field: int(n) for field, n in match.groupdict(default="0").items()}
            found[key] = replace(found[key], **numbers)
    return list(found.values())


# --------------------------------------------------------------------------- short names

TYPES = {"float": "f32", "Half": "f16", "BFloat": "bf16"}


def enums(sources: Iterable[str]) -> dict[str, list[str]]:
    """Names of the values of every enum class whose values are 0, 1, 2 ..."""
    found = {}
    for source in sources:
        source = re.sub(r"//.*", "", source)
        for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", source):
            values = re.findall(r"k(\w+)", body)
            found[name] = [re.sub(r"(?<!^)(?=[A-Z])", "_", value).lower() for value in values]
    return found


def shorten(demangled: str, known: dict[str, list[str]]) -> str:
    """`void pydist::cuda::(anonymous namespace)::f_kernel<pydist::Half>(int)` to `f<f16>`."""

    def value(match: re.Match[str]) -> str:
        names, index = known.get(match[1], []), int(match[2])
        return names[index] if index < len(names) else f"{match[1]} {index}"

    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(?:pydist|cuda)::", "", name)
    name = re.sub(r"\((\w+)\)(\d+)", value, name)
    name = re.sub(r"\(.*", "", name)  # the parameters
    name = re.sub(r"\b\w+\b", lambda word: TYPES.get(word[0], word[0]), name)
    return name.replace("_kernel", "", 1)


def readable(usages: list[Usage]) -> list[Usage]:
    """The same under short names, sorted by them."""
    sources = [*SOURCES.rglob("*.cu*"), *SOURCES.parent.glob("wire/*.h")]
    known = enums(path.read_text() for path in sources)
    done = subprocess.run(
        ["c++filt"], input="\n".join(usage.name for usage in usages), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    names = [shorten(line, known) for line in done.stdout.splitlines()]
    renamed = [replace(usage, name=name) for usage, name in zip(usages, names, strict=True)]

    def natural(usage: Usage) -> tuple[list[str | int], int]:
        parts = re.split(r"(\d+)", usage.name)  # every other one is a number
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], usage.arch

    return sorted(renamed, key=natural)


# --------------------------------------------------------------------------- build


def record(command: list[str]) -> int:
    """Runs nvcc; what it prints also goes into a file beside the object."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or "-c" not in command:
        sys.stdout.write(done.stdout)
        return done.returncode
    sys.stdout.writelines(
        line for line in done.stdout.splitlines(keepends=True)
        if not line.startswith(("ptxas info", "    "))
    )  # fmt: skip
    Path(command[command.index("-o") + 1] + REPORT).write_text(done.stdout)
    return 0


def build(directory: Path, archs: list[int], *targets: str) -> list[Usage]:
    """Compiles every kernel that has changed, and more targets; the reports of all kernels."""
    import pybind11

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    launcher = f"{sys.executable};{Path(__file__).resolve()};--record"
    configure = [
        cmake, "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYDIST_CUDA=1", "-DPYDIST_PTXAS=1", f"-DCMAKE_CUDA_COMPILER_LAUNCHER={launcher}",
        "-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(f"{arch}-real" for arch in archs),
    ]  # fmt: skip
    quiet = subprocess.run(configure, capture_output=True, text=True)
    if quiet.returncode:
        raise SystemExit(f"{quiet.stdout}{quiet.stderr}pydist: configuring with CUDA failed")
    command = [cmake, "--build", directory, "--target", "pydist_cuda", *targets]
    if subprocess.run(command).returncode:
        raise SystemExit("pydist: compiling the CUDA kernels failed")
    reports = {path.name: path for path in directory.rglob(f"*{REPORT}")}
    wanted = [f"{source.name}.o{REPORT}" for source in sorted(SOURCES.rglob("*.cu"))]
    return [usage for name in wanted for usage in parse(reports[name].read_text())]


# --------------------------------------------------------------------------- report


def print_table(usages: list[Usage], archs: list[int]) -> None:
    """One row a kernel; bytes that differ between architectures are given for each of them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    text = (SOURCES / "common.cuh").read_text()
    threads = int(re.search(r"kBlockThreads = (\d+)", text)[1])  # type: ignore[index]
    table = Table(
        title=f"blocks: of {threads} threads, on one multiprocessor",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kernel", no_wrap=True)
    for heading in ("regs", "blocks"):
        for arch in archs:
            table.add_column(f"{heading}\nsm_{arch}", justify="right")
    for heading in ("stack", "spill\nstores", "spill\nloads", "shared\nmemory"):
        table.add_column(heading, justify="right")
    rows: dict[str, dict[int, Usage]] = {}
    for usage in usages:
        rows.setdefault(usage.name, {})[usage.arch] = usage
    last = ""
    for name, by_arch in rows.items():
        kernel = name.split("<")[0]
        if last and kernel != last:
            table.add_section()
        last = kernel
        there = [by_arch.get(arch) for arch in archs]
        cells = [str(usage.registers or "-") if usage else "-" for usage in there]
        cells += [str(usage.blocks_per_sm(threads) or "-") if usage else "-" for usage in there]
        for field in fields(Usage)[3:]:
            values = [str(getattr(usage, field.name)) for usage in there if usage]
            cells.append("/".join(values) if len(set(values)) > 1 else values[0])
        bad = any(usage.bad for usage in by_arch.values())
        table.add_row(name, *cells, style="bold red" if bad else None)
    Console(width=max(Console().width, 140)).print(table)  # wraps rather than cuts


def verdict(usages: list[Usage]) -> tuple[int, str]:
    """Exit status, and what is wrong or that nothing is."""
    wrong = [
        f"FAILED {u.name} on sm_{u.arch}: {u.stack} bytes stack frame, {u.spill_stores} bytes "
        f"spill stores, {u.spill_loads} bytes spill loads"
        for u in usages if u.bad
    ]  # fmt: skip
    if wrong:
        return 1, "\n".join(wrong)
    if not usages:
        return 1, "FAILED: ptxas reported no kernel"
    most = max(usages, key=lambda usage: usage.registers)
    kernels, archs = {u.name for u in usages}, {u.arch for u in usages}
    return 0, (
        f"{len(kernels)} kernels on {len(archs)} architectures: at most {most.registers} registers "
        f"({most.name} on sm_{most.arch}), no spills, no stack frames"
    )


def main() -> int:
    if sys.argv[1:2] == ["--record"]:
        return record(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "ptxas", help="where to")
    parser.add_argument("--module", action="store_true", help="link the kernels, and import them")
    options = parser.parse_args()
    targets = ["_C"] if options.module else []
    usages = readable(build(options.build, options.architectures, *targets))
    print_table(usages, options.architectures)
    if options.module:
        print(f"a module with CUDA {imported(options.build)}")
    status, text = verdict(usages)
    print(text)
    return status


def imported(directory: Path) -> str:
    """What the compiled module of a folder says of CUDA, once another process has imported it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _C; print(_C.CUDA_BUILD)"
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
