"""Hardware counters of ten kernels, beside what bench/kernel_model.py says of them.

    python bench/gpu/counters.py --json counters.json            # runs itself under ncu
    python bench/gpu/counters.py --device cpu --json out.json    # without ncu: the kernels alone

ncu times a kernel alone and replays it once for each group of counters; it looks at one call of
each, behind a mark. Per call: bytes that passed the memory's bus in times the least, instructions
per element, and how busy memory and pipes were.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from facts import find_tool

NUMEL = {"cuda": 1 << 26, "cpu": 1 << 16}
# Kernel, beginning of the variant, dtype: one of each kind of bound that the model knows.
CHOSEN = (
    ("pack_signs", "", "float32"),
    ("unpack_signs", "", "bfloat16"),
    ("lion_pack_", "float32", "float32"),
    ("quantize", "BlockInt(4)", "float32"),
    ("dequantize", "BlockInt(4)", "float32"),
    ("quantize_feedback_", "BlockInt(4)", "float32"),
    ("reduce_quantized", "BlockInt(4), blocks of 512, 8", "bits"),
    ("ternary_pack", "", "float32"),
    ("topk_select", "TopK(0.001)", "float32"),
    ("sum_values", "2", "float32"),
)
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "instructions": "smsp__inst_executed.sum",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "alu_percent": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
SUMMED = ("seconds", "dram_bytes", "instructions")  # over the launches of a call
UNITS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "nsecond": 1e-9, "msecond": 1e-3, "ms": 1e-3,
         "second": 1.0, "s": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
         "KB": 1e3, "MB": 1e6, "GB": 1e9}  # fmt: skip
MARK = "spin_kernel"  # of torch.cuda._sleep, launched before each call: so launches find their rows


def chosen_cases(device: str) -> list[Any]:
    """The cases of :data:`CHOSEN`."""
    from pydist.bench.case import Maker
    from pydist.bench.cases import cases

    kernels = [kernel for kernel, _, _ in CHOSEN]
    every = list(cases(Maker(NUMEL[device], device, ("float32", "bfloat16")), kernels))
    return [
        next(
            case
            for case in every
            if (case.kernel, case.dtype) == (kernel, dtype) and case.variant.startswith(variant)
        )
        for kernel, variant, dtype in CHOSEN
    ]


def call(device: str) -> None:
    """Calls each kernel once between the profiler's marks, after one call to warm up."""
    import torch

    for case in chosen_cases(device):
        buffers = case.make()
        case.run(buffers)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
        case.run(buffers)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------- what ncu says


def table(output: str) -> Iterator[tuple[int, dict[str, str]]]:
    """ncu's CSV rows, each a metric of a launch, with the number of the call it belongs to."""
    head = re.search(r'^"ID",', output, re.MULTILINE)
    if head is None:
        return
    text = "\n".join(x for x in output[head.start() :].splitlines() if x.startswith('"'))
    rows = sorted(csv.DictReader(io.StringIO(text)), key=lambda row: int(row["ID"]))
    marks: set[str] = set()
    for row in rows:
        if MARK in row["Kernel Name"]:
            marks.add(row["ID"])
        else:
            yield len(marks) - 1, row


def counted(output: str) -> dict[int, dict[str, float]]:
    """Counters by call: sums over its launches, percentages weighted by their time."""
    launches: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    names = {metric: name for name, metric in METRICS.items()}
    for number, row in table(output):
        name, value = names.get(row["Metric Name"]), row["Metric Value"].replace(",", "")
        if name is not None and re.fullmatch(r"[\d.]+(e[-+]?\d+)?", value):  # not n/a, not nan
            unit = UNITS.get(row["Metric Unit"], 1.0)
            launches[number, row["ID"]][name] = float(value) * unit
    found: dict[int, dict[str, float]] = {}
    for number in sorted({number for number, _ in launches}):
        here = [values for (of, _), values in launches.items() if of == number]
        if not all("seconds" in values for values in here):
            continue
        whole = sum(values["seconds"] for values in here)
        entry = {"launches": float(len(here))}
        for name in METRICS:
            if all(name in values for values in here):
                weights = [1.0 if name in SUMMED else v["seconds"] / whole for v in here]
                entry[name] = sum(w * v[name] for w, v in zip(weights, here, strict=True))
        found[number] = entry
    return found


def report(output: str, device: str) -> list[dict[str, Any]]:
    """A row for each call: its counters, and what follows from them."""
    rows = []
    counters = counted(output)
    for number, case in enumerate(chosen_cases("cpu")):
        scale = NUMEL[device] / NUMEL["cpu"]
        least, numel = case.bytes * scale, NUMEL[device]
        row = {"kernel": case.kernel, "variant": case.variant, "dtype": case.dtype, "numel": numel}
        if entry := counters.get(number):
            row |= entry
            if "dram_bytes" in entry:
                row["moved"] = entry["dram_bytes"] / least
            if "instructions" in entry:
                row["instructions_per_element"] = 32 * entry["instructions"] / numel
            row["gigabytes_per_second"] = least / entry["seconds"] / 1e9
        rows.append(row)
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as text."""
    columns = (
        ("us", 7, lambda row: f"{1e6 * row['seconds']:.1f}"),
        ("moved", 6, lambda row: f"{row['moved']:.2f}x"),
        ("instr", 6, lambda row: f"{row['instructions_per_element']:.1f}"),
        ("dram", 5, lambda row: f"{row['dram_percent']:.0f}%"),
        ("issue", 6, lambda row: f"{row['issue_percent']:.0f}%"),
        ("alu", 5, lambda row: f"{row['alu_percent']:.0f}%"),
        ("L2 hit", 7, lambda row: f"{row['l2_hit_percent']:.0f}%"),
    )
    heads = " ".join(f"{head:>{width}}" for head, width, _ in columns)
    lines = [f"{'counters of one call':<56} {heads}"]
    for row in rows:
        cells = []
        for _, width, cell in columns:
            try:
                cells.append(f"{cell(row):>{width}}")
            except KeyError:  # not counted
                cells.append(f"{'-':>{width}}")
        name = f"{row['kernel']} ({row['variant']}) {row['dtype']}"
        lines.append(f"{name[:56]:<56} {' '.join(cells)}")
    return lines


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Hardware counters of ten kernels.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--call", action="store_true", help="call the kernels, for ncu")
    options = parser.parse_args()
    if options.call:
        call(options.device)
        return 0
    command = [sys.executable, __file__, "--call", "--device", options.device]
    if options.device == "cuda":
        tool = find_tool("ncu")
        assert tool is not None, "ncu was not found"
        command = [
            tool, "--csv", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--metrics", ",".join(METRICS.values()), *command,
        ]  # fmt: skip
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "LC_ALL": "C"},  # numbers with a point
    )  # fmt: skip
    if done.returncode:
        print(done.stdout)
        return done.returncode
    rows = report(done.stdout, options.device)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(shown(rows)))
    if options.device == "cpu":
        print(f"{len(rows)} calls; there are no counters on the CPU")
        return 0
    counted_rows = sum("seconds" in row for row in rows)
    if not counted_rows:
        print(done.stdout)
    print(f"{counted_rows} of {len(rows)} calls counted")
    return 0 if counted_rows == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
