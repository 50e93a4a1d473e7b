"""What a call of a kernel costs on 64 elements, where all of it is Python and dispatch.

    python bench/calls.py --json bench/results/calls.json
    python bench/calls.py --checkouts OLD .        # another checkout, in turn, in its own processes

Every number is a multiple of ``torch.sign(x, out=y)`` of as many elements, timed between the others
in the same process; the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

N, CALLS, SAMPLES = 64, 400, 15


def calls() -> dict[str, Callable[[], object]]:
    """The calls that are timed, by name."""
    import torch

    from pydist import QSGD, arrays, ops

    x, momentum, codec = torch.randn(N), torch.zeros(N), QSGD(4)
    payloads = torch.randint(0, 256, (4, N // 8), dtype=torch.uint8)
    out, planes = torch.empty(N // 8, dtype=torch.uint8), ops.majority_vote(payloads)
    coded = ops.quantize(x, codec)
    betas: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99}
    found: dict[str, Callable[[], object]] = {}
    for kind, m, put in (("torch", ops, lambda t: t), ("numpy", arrays, lambda t: t.numpy())):
        a, mom, votes, bits = put(x), put(momentum), put(payloads), put(planes)
        target, target_planes, target_codes = put(out), put(planes.clone()), put(coded.clone())
        found |= {
            f"pack_signs, {kind}": lambda m=m, a=a: m.pack_signs(a),
            f"pack_signs, {kind}, out": lambda m=m, a=a, o=target: m.pack_signs(a, out=o),
            f"majority_vote, {kind}": lambda m=m, v=votes: m.majority_vote(v),
            f"majority_vote, {kind}, out": lambda m=m, v=votes, o=target_planes: m.majority_vote(
                v, out=o
            ),
            f"lion_pack_, {kind}": lambda m=m, a=a, b=mom: m.lion_pack_(a, b, **betas),
            f"lion_pack_, {kind}, out": lambda m=m, a=a, b=mom, o=target: m.lion_pack_(
                a, b, **betas, out=o
            ),
            f"lion_apply_, {kind}": lambda m=m, a=a, p=bits: m.lion_apply_(a, p, lr=1e-9),
            f"quantize, {kind}": lambda m=m, a=a: m.quantize(a, codec),
            f"quantize, {kind}, out": lambda m=m, a=a, o=target_codes: m.quantize(
                a, codec, out=o
            ),
        }  # fmt: skip
    return found


def measure() -> dict[str, float]:
    """Each call over ``torch.sign``, both sampled in turn."""
    import torch

    torch.set_num_threads(1)
    x, y = torch.randn(N), torch.empty(N)
    yardstick = timeit.Timer(lambda: torch.sign(x, out=y))
    ratios = {}
    for name, call in calls().items():
        timer, taken = timeit.Timer(call), []
        for _ in range(SAMPLES):
            taken.append((timer.timeit(CALLS), yardstick.timeit(CALLS)))
        ratios[name] = min(t for t, _ in taken) / min(s for _, s in taken)
    return ratios


def measured_in(checkout: Path) -> dict[str, float]:
    """The same in a process that imports another checkout."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "import calls, json; print(json.dumps(calls.measure()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True,
        cwd=checkout,  # which comes first in what can be imported
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in args.checkouts}
    for _ in range(args.rounds):
        for checkout in args.checkouts:
            found[checkout].append(measured_in(checkout))
    rows = {
        name: [
            round(statistics.median(one[name] for one in found[checkout]), 1)
            for checkout in args.checkouts
        ]
        for name in found[args.checkouts[-1]][0]
    }
    print(f"multiples of torch.sign(x, out=y) of {N} elements")
    for name, values in rows.items():
        print(f"{name:28}" + "".join(f"{value:8.1f}" for value in values))
    if args.json is not None:
        from pydist.bench.machine import machine

        record = {
            "command": "python bench/" + " ".join(["calls.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "machine": machine(), "elements": N, "checkouts": len(args.checkouts),
            "multiples_of_sign": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
