"""The command line: ``pydist info | check | bench``, also as ``python -m pydist``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from pydist import __version__, selfcheck
from pydist.bench import options as bench_options
from pydist.kernels import environment


def _cuda_line(facts: dict[str, Any]) -> str:
    if facts["cuda_build"] is None:
        return "not built (no nvcc was found, or PYDIST_CUDA=0)"
    if facts["cuda_devices"]:
        return str(facts["cuda_build"])
    return f"{facts['cuda_build']}; built, but this machine shows no device"


def info(args: argparse.Namespace) -> int:
    """Prints what was built and what is here; 1 where ``PYDIST_ISA`` cannot be followed."""
    facts = environment.describe()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 1 if facts["isa_error"] else 0
    lines = {
        "pydist": facts["version"],
        "wire version": facts["wire_version"],
        "python": facts["python"],
        "numpy": facts["numpy"] or "not installed",
        "torch": facts["torch"] or "not installed",
        "instruction set": facts["isa"] or f"error: {facts['isa_error']}",
        "supported": ", ".join(facts["supported_isas"]),
        "cuda": _cuda_line(facts),
        "devices": ", ".join(["cpu", *facts["cuda_devices"]]),
    }
    for name, value in lines.items():
        print(f"{name:<16} {value}")
    return 1 if facts["isa_error"] else 0


def check(args: argparse.Namespace) -> int:
    """Compares every kernel on every backend with the reference; 1 where a bit differs.

    Also 1 where CUDA alone is asked for and there is nothing to check it on.
    """
    facts = environment.describe()
    if facts["isa_error"]:
        print(f"pydist check: {facts['isa_error']}", file=sys.stderr)
        if args.json:
            print(json.dumps({"checked": [], "error": facts["isa_error"]}))
        return 1
    checked: list[dict[str, Any]] = []
    for run, kernel, cases, difference in selfcheck.check_all(args.device):
        found = None if difference is None else str(difference)
        checked.append({"backend": run.name, "kernel": kernel, "cases": cases, "difference": found})
        if not args.json:
            verdict = "DIFFERS" if difference else "ok"
            print(f"{run.name:<16} {kernel:<19} {cases:>5} cases  {verdict}")
        if difference:
            print(f"  {difference}", file=sys.stderr)
    unchecked = _why_cuda_is_unchecked(facts) if args.device != "cpu" else ""
    failures = sum(1 for one in checked if one["difference"])
    if args.json:
        print(json.dumps({"checked": checked, "cuda_unchecked": unchecked or None}, indent=2))
    else:
        if unchecked:
            print(textwrap.fill(f"cuda: not checked: {unchecked}", 80, subsequent_indent="  "))
        print(_summary(checked, failures))
    return 1 if failures or (unchecked and args.device == "cuda") else 0


def _summary(checked: Sequence[dict[str, Any]], failures: int) -> str:
    """One line about everything that was checked."""
    if not checked:
        return "nothing was checked"
    kernels, backends = (len({one[what] for one in checked}) for what in ("kernel", "backend"))
    cases = sum(one["cases"] for one in checked)
    verdict = f"{failures} comparisons DIFFER" if failures else "all bit-identical"
    return f"{kernels} kernels on {backends} backends, {cases:,} cases: {verdict}"


def _why_cuda_is_unchecked(facts: dict[str, Any]) -> str:
    if facts["cuda_build"] is None or not facts["cuda_devices"]:
        return _cuda_line(facts)
    if not (environment.torch_sees_cuda() or environment.has_cupy()):
        return "needs torch with CUDA or CuPy"
    return ""


def bench_kernels(args: argparse.Namespace, **held_against: Any) -> int:
    """Times every kernel; 2 where something that it needs is missing."""
    # An idle OpenMP thread of torch spins for milliseconds on the core that pydist's thread wants;
    # torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from pydist.bench import kernels
    except ModuleNotFoundError as error:
        print(
            f"pydist bench kernels: {error.name} is not installed: "
            "pip install 'pydist-train[torch,bench]'",
            file=sys.stderr,
        )
        return 2
    return kernels.main(args, args.typed, **held_against)


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    main_parser = argparse.ArgumentParser(
        prog="pydist", description="Data-parallel training where the network is slow."
    )
    main_parser.add_argument("--version", action="version", version=f"pydist {__version__}")
    commands = main_parser.add_subparsers(dest="command", metavar="command")
    described = commands.add_parser("info", help="what was built and what this machine has")
    described.add_argument("--json", action="store_true", help="print JSON")
    described.set_defaults(run=info)
    checked = commands.add_parser(
        "check", help="compare every kernel on every backend with the reference, bit for bit"
    )
    checked.add_argument("--json", action="store_true", help="print JSON")
    checked.add_argument(
        "--device", choices=("cpu", "cuda"), help="check the backends on it alone; default both"
    )
    checked.set_defaults(run=check)
    timed = commands.add_parser("bench", help="benchmarks")
    timed.set_defaults(run=lambda _: timed.print_help())
    what = timed.add_subparsers(dest="benchmark", metavar="benchmark")
    kernels = what.add_parser("kernels", help="every kernel against memory and its rivals")
    bench_options.add_arguments(kernels)
    kernels.set_defaults(run=bench_kernels)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; default those of the process.

    Returns:
        The exit status: 0, 1 where something is wrong, 2 for wrong usage.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    described = parser()
    args = described.parse_args(typed)
    args.typed = shlex.join(["pydist", *typed])
    if not args.command:
        described.print_help()
        return 0
    status: int | None = args.run(args)
    return status or 0
