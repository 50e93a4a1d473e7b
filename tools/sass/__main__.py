"""`make sass`: what decides a CUDA kernel's speed, counted by executing its sm_90 code; no GPU.

Prints a table; --check fails where a kernel got worse than bench/results/sass.json by more than
10 %, --update rewrites that file. Every case's output is compared with the CPU kernels'.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import kernel_model
import ptxas

from sass import cases, table
from sass.counts import registers
from sass.host import MODULE, Executor

BUILD = ptxas.ROOT / "build" / "ptxas"


def architectures(folder: Path) -> list[int]:
    """Those that the folder is configured for, if sm_90 is one: nothing is then compiled twice."""
    cache = folder / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    line = re.search(r"^CMAKE_CUDA_ARCHITECTURES:\w+=(.*)$", text, re.MULTILINE)
    found = [int(arch) for arch in re.findall(r"\d+", line[1])] if line else []
    return found if 90 in found else [90]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sass", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a kernel got worse")
    parser.add_argument("--update", action="store_true", help="rewrite the committed table")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--kernels", nargs="+", choices=cases.KERNELS, metavar="KERNEL")
    parser.add_argument("--build", type=Path, default=BUILD, help="where the objects are")
    options = parser.parse_args()
    if options.kernels and options.update:
        parser.error("--update is of all kernels")
    ptxas.build(options.build, architectures(options.build), MODULE)
    executor = Executor(options.build, registers(options.build))
    rows = list(cases.rows(executor, options.kernels))
    table.print_table(rows)
    print(f"{len(rows)} cases: every byte as the CPU kernels write it")
    for path in (options.json, kernel_model.TABLE if options.update else None):
        if path is not None:
            path.write_text(table.as_json(rows))
    return verdict(rows, options.kernels) if options.check else 0


def verdict(rows: list[table.Row], kernels: list[str] | None) -> int:
    """The exit status of --check; prints what got worse."""
    before = [
        row for row in table.read(kernel_model.TABLE) if not kernels or row["kernel"] in kernels
    ]
    found = table.worse(before, rows)
    for line in found:
        print(f"FAILED {line}")
    if found:
        print(f"meant so: {table.COMMAND} rewrites {kernel_model.TABLE.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
