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
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from command import at_least, common_options, launch, measured, work
from links import ClusterError, Network
from netns import Cluster
from probe import probe
from rounds import Method, Report, ring_bytes, show, summarise
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


# ---------------------------------------------------------------- what starts and sums up


def run_all_reduce(options: argparse.Namespace) -> Report:
    """Launch, sum up and show the all-reduce benchmark."""
    network = Network.of(options)
    with Cluster(network) as cluster:
        rows = summarise(launch(cluster, __file__, options), options.local)
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
    rows: dict[str, Report] = {}
    failed: dict[str, str] = {}
    drops, network = 0, Network.of(options)
    for names in [together, *alone] if together else alone:
        settings = argparse.Namespace(**{**vars(options), "methods": names})
        if names is not together:
            settings.timeout = options.patience
        with Cluster(network) as cluster:
            try:
                rows |= summarise(launch(cluster, __file__, settings), options.local)
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


MAKERS = {"all-reduce": reduce_methods, "step": step_methods}
TASKS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "all-reduce": run_all_reduce,
    "step": run_step,
    "goodput": run_goodput,
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Benchmarks on hosts made of network namespaces.")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{all-reduce,step,goodput}")
    common = common_options()
    reduce = tasks.add_parser("all-reduce", parents=[common], help="one tensor, gloo and pydist")
    reduce.add_argument("--numel", type=at_least(1), default=4 * 1024 * 1024)
    reduce.add_argument("--repeats", type=at_least(2), default=20)
    reduce.add_argument(
        "--codecs", nargs="*", default=[], choices=sorted(CODECS), metavar="CODEC",
        help="mean in these codecs too: " + ", ".join(CODECS),
    )  # fmt: skip
    step = tasks.add_parser("step", parents=[common], help="a DDP training step, torch and pydist")
    step.add_argument("--batch", type=at_least(1), default=8, help="samples a host and step")
    step.add_argument("--repeats", type=at_least(2), default=20)
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
    if arguments[:1] == ["worker"]:  # how `launch` calls this file for each rank
        return work(arguments[1], lambda options: MAKERS[options.task](options))
    options = parse(arguments)
    return measured(__file__, options, arguments, TASKS[options.task])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
