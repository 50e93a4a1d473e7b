"""Kernels neither read nor write outside their arrays, and may be called from anywhere at once."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from pydist import _C, reference, selfcheck

# In a process of its own, since what it looks for ends the process.
GUARD_PAGES = """
import ctypes, mmap, sys
import numpy as np
from pydist import selfcheck
from pydist.selfcheck import cases

libc = ctypes.CDLL(None, use_errno=True)

class GuardedMemory(selfcheck.HostMemory):
    '''Arrays that end (or begin) where a page begins (or ends) that nobody may touch.'''

    def __init__(self, isa, at_end):
        super().__init__(isa)
        self.at_end, self.kept = at_end, []

    def put(self, array):
        pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        room = np.frombuffer(memory, dtype=np.uint8)
        guard = pages * mmap.PAGESIZE if self.at_end else 0
        address = room.__array_interface__["data"][0] + guard
        assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
        begin = guard - array.nbytes if self.at_end else mmap.PAGESIZE
        there = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        there[...] = array
        return there

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
        [sys.executable, "-c", GUARD_PAGES, isa], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, f"ended at {done.stdout.splitlines()[-1:]}\n{done.stderr}"


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
