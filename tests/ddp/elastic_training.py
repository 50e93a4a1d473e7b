"""A training script for torchrun that survives the death of its ranks; for test_ddp_restart.py.

Every rank saves its own file after every second step. Whoever starts takes up the last step of
which all ranks' files are there, whatever their number. Each ``--kill STEP:RANK`` kills a rank in
the middle of a step, the first one in the first attempt, and so on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_collectives import bits
from ranks_ddp_checkpoint import unsent, unsent_of
from ranks_ddp_faults import at_bucket, last_complete, load, made, save
from ranks_ddp_state import steps_of

from pydist.ddp import CompressionState


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--codec", default="all")
    parser.add_argument("--kill", action="append", default=[], metavar="STEP:RANK")
    parser.add_argument("--kill-agent", type=int, help="in this step, and this rank; once")
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net, ddp, state, opt = made(options.codec)
    saved = [torch.load(file, weights_only=True) for file in last_complete(options.folder)]
    start = load(options.folder, net, opt, state)
    lost = missing(ranks, state, [one["compression"] for one in saved])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kills = [tuple(map(int, kill.split(":"))) for kill in options.kill]
    fate = kills[attempt] if attempt < len(kills) else (options.kill_agent, rank)

    def die() -> None:
        if options.kill_agent is not None:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(start, options.steps):
        with at_bucket(state, "backward", die) if fate == (step, rank) else ExitStack():
            steps_of(net, opt, rank, [step], ddp)
        if step % 2:
            save(options.folder, step + 1, rank, net, opt, state)
    result = {
        "start": start, "ranks": ranks, "lost": lost, "saved_by": len(saved),
        "attempt": attempt,
        "parameters": hashlib.sha256(b"".join(bits(p) for p in net.parameters())).hexdigest(),
    }  # fmt: skip
    (options.folder / f"result-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def missing(ranks: int, state: CompressionState, saved: list[dict[str, Any]]) -> float:
    """How much of what was not sent is missing after a start, against its largest entry."""
    found, before = unsent(ranks, state), unsent_of(saved)
    parts = [abs(found[name] - wanted).max() / abs(wanted).max() for name, wanted in before.items()]
    return float(max(parts, default=0.0))


if __name__ == "__main__":
    main()
