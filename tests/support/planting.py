"""Bugs planted into pydist's own kernels: compiles a changed copy, runs the self-check on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import emulated


@dataclasses.dataclass(frozen=True)
class Bug:
    """A change of one place in a source, and what must be said of it.

    Attributes:
        name: What is wrong.
        file: Which file of csrc/cuda is changed.
        right: The text there; it occurs once.
        wrong: The text in its place.
        kernel: Which kernel's source is compiled, and checked.
        found: What the checks must say, a regular expression.
    """

    name: str
    file: str
    right: str
    wrong: str
    kernel: str
    found: str


DIFFERENCE = r"DifferenceError: {} on emulated cuda.*instead of"
BUGS = [
    Bug("tail read by one too far", "common.cuh", "v[j] = i + j < n ? x[i + j] : T{}",
        "v[j] = i + j <= n ? x[i + j] : T{}", "pack_signs",
        r"out-of-range read at .*pack_signs_kernel"),
    Bug("tail written by one too far", "common.cuh", "if (i + j < n) x[i + j] = v[j];",
        "if (i + j <= n) x[i + j] = v[j];", "unpack_votes",
        r"out-of-range write at .*unpack_votes_kernel"),
    Bug("bits transposed over a wrong distance", "common.cuh",
        "__shfl_xor_sync(kAllLanes, bits, distance)",
        "__shfl_xor_sync(kAllLanes, bits, distance / 2)", "pack_signs",
        DIFFERENCE.format("pack_signs")),
    Bug("rows searched by half a warp", "rows.cuh", "__ballot_sync(kAllLanes, below)",
        "__ballot_sync(0xFFFFu, below)", "pack_signs",
        r"__ballot_sync \(rows\.cuh:\d+, mask 0x0000ffff\) lacks the bit of lane \d+"),
    Bug("flags raised without an atomic", "common.cuh", "atomicOr(flags, value)",
        "*flags |= value", "pack_signs", r"data race: .*pack_signs_kernel"),
    Bug("vectors read from any address", "kernels/signs_pack.cu",
        "n == kElementChunk && aligned<16>(row.x)", "n == kElementChunk", "pack_signs",
        r"misaligned access to .*uint4.*pack_signs_kernel"),
    Bug("one lane leaves before a shuffle", "kernels/signs_pack.cu",
        "  return transpose_bits<kWidth>(bits, lane);",
        "  if (lane == 31 && n <= 31 * kWidth) return bits;\n"
        "  return transpose_bits<kWidth>(bits, lane);", "pack_signs",
        r"lanes diverge: __\w+ \(common\.cuh:\d+, mask 0xffffffff\)"),
]  # fmt: skip

SOURCES = {"pack_signs": "signs_pack.cu", "unpack_votes": "signs_unpack.cu"}
CHECK = """
import sys
import emulated
from pydist import selfcheck
from pydist.selfcheck import cases

kernel = sys.argv[1]
for seed in emulated.SEEDS:
    run = selfcheck.KernelRunner(emulated.Memory(seed))
    _, difference = cases.check_kernel(run, kernel)
    if difference:
        raise difference
"""


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def _compile(bug: Bug, library: Path) -> None:
    """Builds the library of emulated kernels again with the one changed source."""
    sources = library.parent / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", sources)
    changed = sources / "cuda" / bug.file
    text = changed.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} has changed: mend the bug {bug.name!r}"
    changed.write_text(text.replace(bug.right, bug.wrong))

    entries = json.loads((emulated.FOLDER / "compile_commands.json").read_text())
    objects = []
    for entry in entries:
        output = Path(entry["directory"]) / entry["output"]
        if "pydist_emulator.dir" in entry["output"]:
            objects.insert(0, str(output))  # before the kernels, as in CMakeLists.txt
        if "pydist_emulated_kernels.dir" not in entry["output"]:
            continue
        if Path(entry["file"]).name != SOURCES[bug.kernel]:
            objects.append(str(output))
            continue
        command = shlex.split(entry["command"].replace(str(emulated.ROOT / "csrc"), str(sources)))
        command[command.index("-o") + 1] = str(library.with_suffix(".o"))
        compiler = command[0]
        _run(command, entry["directory"])
        objects.append(str(library.with_suffix(".o")))
    _run([compiler, "-shared", "-o", str(library), *objects, "-ldl"], str(library.parent))


def run_with(bug: Bug) -> str:
    """What the self-check of the kernel says, run on the emulator with the bug planted."""
    folder = emulated.FOLDER / "planted" / hashlib.sha256(str(bug).encode()).hexdigest()[:16]
    library, stamp = folder / emulated.LIBRARY.name, folder / "stamp"
    built = str(emulated.LIBRARY.stat().st_mtime_ns)
    if not stamp.exists() or stamp.read_text() != built:  # else kept from an earlier run
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for module in emulated.FOLDER.glob("_C_emulated*"):
            shutil.copy2(module, folder)
        _compile(bug, library)
        stamp.write_text(built)
    path = f"{emulated.ROOT}:{emulated.ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, "-c", CHECK, bug.kernel], capture_output=True, text=True, timeout=100,
        env={"PYTHONPATH": path, "PYDIST_EMULATED": str(folder), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stderr
