"""The process behind :class:`pydist.bench.workers.Worker`: measures the cases it is told to."""

from __future__ import annotations

import argparse
from multiprocessing.connection import Connection

from pydist import _C
from pydist.bench import rows
from pydist.bench.measure import Bench


def serve(descriptor: int) -> None:
    """Answers numbers of cases with outcomes until it is told to end, or nobody is there."""
    pipe = Connection(descriptor)
    options: argparse.Namespace = pipe.recv()
    if options.isa:
        _C.select_isa(options.isa)
    plan, bench = rows.plan(options), None
    try:
        while (number := pipe.recv()) is not None:
            if bench is None:  # the device is not touched while another process measures on it
                bench = Bench(options.device, options.repeats, options.threads, options.clock)
            pipe.send(bench.measured(plan[number], lambda: None))
    except EOFError:
        return
