"""Cases of a benchmark that break; imported by its workers in place of the real plan."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import time
from typing import Any

from pydist.bench import measure, rows, timing
from pydist.bench.case import Case

measure.cold_bytes = lambda device: 1 << 10
timing.SAMPLE_SECONDS = 1e-5
usual = rows.plan


def reads_back_in_capture(s: Any) -> None:
    """What torch says where ``item()`` meets a capture, which then stays broken."""
    Broken.context = True
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def crashes(s: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def aborts(s: Any) -> None:
    os.abort()


def hangs(s: Any) -> None:
    time.sleep(600)


class Broken:
    """Whether a row of this process has broken its CUDA context, for those that follow."""

    context = False


def in_broken_context(run: Any) -> Any:
    def checked(s: Any) -> Any:
        if Broken.context:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly")
        return run(s)

    return checked


# Kernel and dtype, or one dtype of "bits".
PLANTED = {
    ("unpack_signs", "float32"): reads_back_in_capture,
    ("ternary_scale", "float32"): crashes,
    ("ternary_pack", "float32"): aborts,
    ("topk_scatter", "float32"): hangs,
}


def plan(options: argparse.Namespace) -> list[Case]:
    """The usual plan with the faults in it."""
    found = []
    for case in usual(options):
        run = PLANTED.get((case.kernel, case.dtype)) or in_broken_context(case.run)
        found.append(dataclasses.replace(case, run=run))
    return found


rows.plan = plan
