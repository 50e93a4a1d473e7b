"""Kernels neither read nor write outside their arrays, and may be called from anywhere at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import emulated
import numpy as np
import pytest

from pydist import _C, selfcheck
from pydist.reference import signs as reference
from pydist.selfcheck import cases
from pydist.selfcheck import topk as topk_cases

# In a process of its own, since what it looks for ends the process.
GUARD_PAGES = """
import sys
from guarded import guarded
from pydist import selfcheck
from pydist.selfcheck import cases

class GuardedMemory(selfcheck.HostMemory):
    def __init__(self, isa, at_end):
        super().__init__(isa)
        self.at_end = at_end

    def put(self, array):
        return guarded(array, at_end=self.at_end)

for at_end in (True, False):
    for kernel in selfcheck.KERNELS:
        print(kernel, at_end, flush=True)
        run = selfcheck.KernelRunner(GuardedMemory(sys.argv[1], at_end))
        _, difference = cases.check_kernel(run, kernel)
        if difference:
            raise difference
"""


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_nothing_outside_an_array_is_touched(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARD_PAGES, isa], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, f"ended at {done.stdout.splitlines()[-1:]}\n{done.stderr}"


@pytest.mark.parametrize(
    ("seed", "at_end"),
    [pytest.param(seed, bool(seed % 2), marks=emulated.MARKS) for seed in emulated.SEEDS],
)
def test_nothing_outside_an_array_is_touched_by_emulated_kernels(
    seed: int, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: there such an access is an error of the launch."""
    # A thread block a top-k block, in shared memory: each takes as long as a thousand elements do.
    monkeypatch.setattr(topk_cases, "LENGTHS", (0, 33, 129))
    run = selfcheck.KernelRunner(emulated.Memory(seed, at_end=at_end))
    for kernel in selfcheck.KERNELS:
        _, difference = cases.check_kernel(run, kernel)
        if difference:
            raise difference


FORK = """
import os, warnings
import numpy as np
from pydist import arrays

warnings.simplefilter("ignore")
x = np.random.default_rng(0).standard_normal(2**20).astype(np.float32)
before = arrays.pack_signs(x, threads=3)
child = os.fork()
if child == 0:
    same = all((arrays.pack_signs(x, threads=3) == before).all() for _ in range(20))
    os._exit(0 if same else 3)
after = arrays.pack_signs(x, threads=3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert (after == before).all()
"""


def test_several_threads_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_calls_from_several_threads_at_once() -> None:
    x = np.random.default_rng(1).standard_normal(2**18 + 5).astype(np.float32)
    expected, _ = reference.pack_signs(x)
    run = selfcheck.KernelRunner(selfcheck.HostMemory(_C.current_isa(), threads=3))
    wrong: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(10):
                payload, _ = run.pack_signs(x, zero_bit=1, segments=None)
                selfcheck.assert_same_bits(payload, expected, "pack_signs")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
