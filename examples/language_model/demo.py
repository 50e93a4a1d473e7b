"""Four workers train a language model on real text while sending one bit per parameter.

Runs AdamW and Lion on averaged float32 gradients and Distributed Lion in both variants, each as
real processes that talk through torch.distributed, then prints a table and writes `demo.png` and
`demo.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from methods import METHODS, Settings
from rich.console import Console
from rich.table import Table

from pydist.bench import drawing

HERE = Path(__file__).resolve().parent


def run_workers(
    workers: int, methods: list[str], settings: Settings, results: Path, device: str = "cpu"
) -> int:
    """Starts the workers with torchrun and waits for them; Ctrl-C ends them all."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(workers)),
        *(str(HERE / "train.py"), "--settings", json.dumps(asdict(settings))),
        *("--methods", *methods, "--device", device, "--results", str(results)),
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # torchrun then ends its workers
        process.wait()
        return 130


def print_table(report: dict[str, Any]) -> None:
    """Prints loss, traffic and time of every method, each beside the first one's."""
    baseline = report["runs"][0]
    table = Table(
        title=f"{report['workers']} workers, {baseline['parameters']:,} parameters, "
        f"{report['settings']['steps']} steps"
    )
    table.add_column("method")
    for title in ("validation loss", "sent a step", "predicted", "less by", "ms a step"):
        table.add_column(title, justify="right")
    for run in report["runs"]:
        sent = run["bytes_measured"] or run["bytes_predicted"]
        first = baseline["bytes_measured"] or baseline["bytes_predicted"]
        table.add_row(
            METHODS[run["method"]].title,
            f"{run['validation_loss']:.4f}",
            f"{run['bytes_measured'] / 1e3:,.1f} kB",
            f"{run['bytes_predicted'] / 1e3:,.1f} kB",
            f"{first / sent:.1f}x",
            f"{run['seconds_per_step'] * 1e3:.1f}",
        )
    Console(width=110).print(
        table,
        "Sent: bytes that a worker's own TCP connections sent, as the kernel counts them.\n"
        "All workers share one machine without a slow network, so the step time shows the cost of "
        "the processor, not the gain of the wire: bench/cluster/ddp.py measures that.",
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws validation loss against steps and against bytes sent."""
    figure, (by_step, by_bytes) = drawing.panels(1, 2, (8, 4), sharey=True)
    for i, run in enumerate(report["runs"]):
        points = run["curve"][1:]
        loss = [point["validation_loss"] for point in points]
        title = METHODS[run["method"]].title
        by_step.plot([point["step"] for point in points], loss, label=title, **drawing.look(i))
        by_bytes.plot([point["bytes_sent"] / 1e6 for point in points], loss, **drawing.look(i))
    by_step.set(xlabel="steps", ylabel="validation loss, nats per byte")
    by_bytes.set(xlabel="MB sent per worker", xscale="log")
    drawing.log_ticks(by_bytes.xaxis)
    drawing.legend_above(figure, by_step, 2)
    drawing.save(figure, path)


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="processes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="default: the tuned ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--redraw", type=Path, help="trains nothing: the runs of this demo.json")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.steps < 12:
        parser.error("--workers must be at least 1 and --steps at least 12")

    settings = Settings(
        steps=arguments.steps,
        seed=arguments.seed,
        warmup=max(1, arguments.steps // 50),
        learning_rate=arguments.learning_rate,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.redraw:
        report = json.loads(arguments.redraw.read_text())
        plot(report, arguments.output / "demo.png")
        print_table(report)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.json"
        code = run_workers(
            arguments.workers, arguments.methods, settings, results, arguments.device
        )
        if code:
            return code
        report = json.loads(results.read_text())
    (arguments.output / "demo.json").write_text(json.dumps(report, indent=1))
    plot(report, arguments.output / "demo.png")
    print_table(report)
    print(f"Wrote {arguments.output / 'demo.png'} and {arguments.output / 'demo.json'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
