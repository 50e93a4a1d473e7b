"""Collectives and training steps timed on several "hosts" of one machine, joined by slow links.

    sudo python bench/cluster/ddp.py all-reduce --hosts 4 --rate 1gbit
    sudo python bench/cluster/ddp.py step --rate 100mbit
    sudo python bench/cluster/ddp.py goodput --rate 100mbit

``goodput`` checks the links themselves. The hosts are network namespaces (see ``netns.py``), so
root is needed; nothing leaves the machine. All ranks share its processor: keep it idle otherwise,
or add ``--realtime``, or what is measured is how long ranks wait for a turn on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from links import ClusterError, Network, network_options
from netns import Cluster
from probe import probe
from rounds import Method, Report, count_bytes, go_first, interleave, ring_bytes, show, summarise
from training import HANGS, METHODS, parameters, trainers

# ---------------------------------------------------------------- what runs on each host


CODECS = {
    **{f"qsgd{bits}": ("QSGD", bits) for bits in range(2, 9)},
    **{f"int{bits}": ("BlockInt", bits) for bits in range(2, 9)},
    **{scale: ("Sign", scale) for scale in ("l1", "l2")},
    **{form: ("BlockFloat", form) for form in ("e4m3", "e5m2")},
}


def codec_of(name: str) -> Any:
    """The codec that the command line calls so."""
    import pydist

    kind, argument = CODECS[name]
    return getattr(pydist, kind)(argument)


def reduce_methods(options: argparse.Namespace) -> dict[str, Method]:
    """All-reduce of one tensor: by gloo in fp32 and fp16, and by pydist where it is there."""
    import torch
    import torch.distributed as dist

    numel, rank, ranks = options.numel, dist.get_rank(), dist.get_world_size()

    def two_phases(payload: float) -> float | None:
        """What a host sends; of several ranks that depends on the way of the second phase."""
        return ring_bytes(ranks, payload) if options.local == 1 else None

    source = torch.randn(numel, generator=torch.Generator().manual_seed(rank))

    def method(
        dtype: torch.dtype, reduce: Callable[[Any], object], predicted: float | None
    ) -> Method:
        start = source.to(dtype)
        work = start.clone()
        return Method(
            call=lambda: reduce(work),
            reset=lambda: work.copy_(start),
            predicted=predicted,
            check=lambda: float(work.double().sum()),
        )

    methods = {
        "gloo fp32": method(torch.float32, dist.all_reduce, ring_bytes(ranks, 4 * numel)),
        "gloo fp16": method(torch.float16, dist.all_reduce, ring_bytes(ranks, 2 * numel)),
    }
    try:
        import pydist

        all_reduce, votes = pydist.all_reduce, pydist.Sign(scale=None)
    except (ImportError, AttributeError) as error:
        print(f"pydist is not there ({error}): only gloo was measured", file=sys.stderr)
        return methods
    methods["pydist vote"] = method(
        torch.float32,
        lambda tensor: all_reduce(tensor, votes, op="vote"),
        two_phases(numel / 8),
    )
    methods["pydist mean"] = method(
        torch.float32, lambda tensor: all_reduce(tensor, votes, op="mean"), None
    )
    for name in options.codecs:
        codec = codec_of(name)
        payload = codec.block_format.payload_bytes(numel)
        methods[f"pydist {name}"] = method(
            torch.float32, partial(all_reduce, codec=codec, op="mean"), two_phases(payload)
        )
    return methods


def step_methods(options: argparse.Namespace) -> dict[str, Method]:
    """A training step of each of the chosen methods; see ``training.py``."""
    import torch.distributed as dist

    made = trainers(options.methods, dist.get_rank(), options.batch, options.bucket_cap_mb)
    return {
        name: Method(call=t.step, reset=lambda: None, predicted=None, check=t.check)
        for name, t in made.items()
    }


def method_worker(options: argparse.Namespace) -> Report:
    """Measure all methods on this host."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    make = step_methods if options.task == "step" else reduce_methods
    methods = make(options)
    times = interleave(methods, options.repeats)
    report: Report = {
        name: {"times": times[name], "check": method.check(), "predicted": method.predicted}
        for name, method in methods.items()
    }
    for name, method in methods.items():
        report[name]["sent"] = count_bytes(method)
    dist.barrier()
    dist.destroy_process_group()
    return report


def work(settings: str) -> int:
    """Entry of the process on each host: measure, print the findings as JSON."""
    options = argparse.Namespace(**json.loads(settings))
    if options.realtime:
        go_first()
    print(json.dumps(method_worker(options)))
    return 0


# ---------------------------------------------------------------- what starts and sums up


def launch(cluster: Cluster, options: argparse.Namespace) -> list[Report]:
    """Run the task's worker on all hosts and return what each found."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).resolve()), "worker", json.dumps(vars(options))]
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        # The addresses have no names, and torch would warn of that once a connection.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    finished = cluster.run(command, env, timeout=options.timeout)
    if finished[0].stderr:
        print(finished[0].stderr.rstrip(), file=sys.stderr)
    return [json.loads(host.stdout) for host in finished]


def run_all_reduce(options: argparse.Namespace) -> Report:
    """Launch, sum up and show the all-reduce benchmark."""
    network = Network.of(options)
    with Cluster(network) as cluster:
        rows = summarise(launch(cluster, options), options.local)
        drops = sum(count["drops"] for count in cluster.counters())
    show(rows, f"all-reduce of {options.numel:,}, {network}")
    return {"methods": rows, "packets_dropped": drops}


def run_step(options: argparse.Namespace) -> Report:
    """Launch, sum up and show the benchmark of training steps.

    A method that hangs (torch's PowerSGD hook does, on gloo) must not take the others with it: it
    runs in a launch of its own.
    """
    together = [name for name in options.methods if name not in HANGS]
    alone = [[name] for name in options.methods if name in HANGS]
    rows, failed, drops, network = {}, {}, 0, Network.of(options)
    for names in [together, *alone] if together else alone:
        settings = argparse.Namespace(**{**vars(options), "methods": names})
        if names is not together:
            settings.timeout = options.patience
        with Cluster(network) as cluster:
            try:
                rows |= summarise(launch(cluster, settings), options.local)
            except ClusterError as error:
                if names is together:
                    raise
                failed[names[0]] = str(error).partition("\n")[0]
            drops += sum(count["drops"] for count in cluster.counters())
    show(rows, f"DDP step, {parameters():,} parameters, {network}")
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    return {"methods": rows, "failed": failed, "packets_dropped": drops}


def run_goodput(options: argparse.Namespace) -> Report:
    """Round trips, and the rate at which each host sends to the next one, all at once."""
    return probe(Network.of(options), realtime=options.realtime)


TASKS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "all-reduce": run_all_reduce,
    "step": run_step,
    "goodput": run_goodput,
}


def _at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not too small."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Benchmarks on hosts made of network namespaces.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{all-reduce,step,goodput}")
    common = argparse.ArgumentParser(add_help=False, parents=[network_options()])
    common.add_argument("--json", metavar="FILE", help="write all figures here")
    common.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS")
    common.add_argument(
        "--realtime", action="store_true", help="let the ranks go before other programs"
    )
    reduce = tasks.add_parser("all-reduce", parents=[common], help="one tensor, gloo and pydist")
    reduce.add_argument("--numel", type=_at_least(1), default=4 * 1024 * 1024)
    reduce.add_argument("--repeats", type=_at_least(2), default=20)
    reduce.add_argument(
        "--codecs", nargs="*", default=[], choices=sorted(CODECS), metavar="CODEC",
        help="mean in these codecs too: " + ", ".join(CODECS),
    )  # fmt: skip
    step = tasks.add_parser("step", parents=[common], help="a DDP training step, torch and pydist")
    step.add_argument("--batch", type=_at_least(1), default=8, help="samples a host and step")
    step.add_argument("--repeats", type=_at_least(2), default=20)
    step.add_argument("--bucket-cap-mb", type=float, default=25.0, help="of every DDP model")
    step.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    step.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS",
        help="for a method that may hang (default %(default)s)",
    )  # fmt: skip
    tasks.add_parser("goodput", parents=[common], help="check the speed of the links")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run one task; returns the exit status."""
    if arguments[:1] == ["worker"]:  # how `launch` calls this file on each host
        return work(arguments[1])
    from pydist.bench.machine import machine

    options = parse(arguments)
    record: Report = {
        "command": shlex.join(["python", "bench/cluster/ddp.py", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    try:
        record |= Network.of(options).record()
        record |= TASKS[options.task](options)
    except ClusterError as error:
        print(f"ddp.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
