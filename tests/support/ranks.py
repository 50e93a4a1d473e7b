"""Real ranks for tests: processes that stay up and run one case after another.

A spawn of four ranks costs seconds, so a world is spawned once and every test of that world size
sends its case to it. A case is a module-level function ``case(rank, world_size, *args)``; what it
returns comes back as a list, one entry a rank. A case that hangs or dies fails by name, and the
world is made anew for the next test.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

# What ranks need and what takes seconds to import (optimizers import torch._dynamo when they are
# made). The tests' own modules are not on the server's path before Python 3.13.
IMPORTED = ["torch._dynamo", "torch.distributed", "pytest", "pydist.ddp", "pydist.optim"]

PG_TIMEOUT = 20  # seconds; a rank that is lost is noticed by then


class RankFailure(AssertionError):
    """A case raised, died or did not end on some rank."""


def _serve(
    rank: int, world_size: int, store: str, pipe: Connection, env: dict[str, str], destroy: bool
) -> None:
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=PG_TIMEOUT),
    )
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        destroy_groups_left_over()
        case, args = order
        try:
            pipe.send((True, case(rank, world_size, *args)))
        except BaseException:
            # Cases share the process: what groups there are may tell who left them.
            names = list(dist.distributed_c10d._world.pg_names.values())
            pipe.send((False, f"{traceback.format_exc()}process groups: {names}\n"))
    if destroy:
        dist.destroy_process_group()


def destroy_groups_left_over() -> None:
    """Ends the groups that the last case has left; all ranks are past it.

    Each group of gloo's has threads that wake a hundred times a second, and so have pydist's of it.
    """
    import torch.distributed as dist

    def left() -> list[Any]:
        return [
            group for group, name in list(dist.distributed_c10d._world.pg_names.items())
            if group is not dist.group.WORLD and not name.startswith("pydist/")
        ]  # fmt: skip

    if not left():
        return
    for group in left():
        dist.destroy_process_group(group)
    forget_shardings()
    gc.collect()  # models hold their groups in circles


def forget_shardings() -> None:
    """DTensor remembers specs by ranks, not by groups: later models would get these dead ones."""
    from torch.distributed.tensor import DTensor, debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is None:  # before torch 2.10
        clear = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear
    clear()


class World:
    """``size`` gloo ranks.

    Args:
        size: Number of ranks.
        env: Environment of each rank, such as ``PYDIST_ISA``; default none.
        destroy: Destroy the process group before a rank exits.
        fork: Fork the ranks from a server that has imported everything: a tenth of a second a world
            instead of seconds, for worlds that one test uses up.
    """

    def __init__(
        self,
        size: int,
        env: list[dict[str, str]] | None = None,
        *,
        destroy: bool = True,
        fork: bool = False,
    ) -> None:
        self.size = size
        self._destroy = destroy
        self._context: Any = mp.get_context("forkserver" if fork else "spawn")
        if fork:  # counts at the first start of the server alone
            self._context.set_forkserver_preload(IMPORTED)
        self._env = env or [{}] * size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = self._context
        self._directory = tempfile.TemporaryDirectory()
        store = os.path.join(self._directory.name, "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, self.size, store, theirs, self._env[rank], self._destroy)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect("start", 60)

    def _collect(self, what: str, timeout: float, lost: int | None = None) -> list[Any]:
        deadline = time.monotonic() + timeout
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if rank == lost:
                continue
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise RankFailure(f"{what}: rank {rank} of {self.size} hangs")
                answers.append(pipe.recv())
            except (EOFError, ConnectionError) as error:
                self.kill()
                raise RankFailure(f"{what}: rank {rank} of {self.size} died") from error
            except RankFailure:
                self.kill()
                raise
        return answers

    def run(
        self,
        case: Callable[..., Any],
        *args: Any,
        timeout: float = 60,
        lost: int | None = None,
    ) -> list[Any]:
        """Runs a case on every rank.

        Args:
            case: A module-level function ``case(rank, world_size, *args)``.
            *args: Further arguments, the same on all ranks.
            timeout: Seconds until the case counts as hanging.
            lost: A rank that dies in this case; nothing is expected of it.

        Returns:
            What the ranks returned, in rank order, without the lost one.

        Raises:
            RankFailure: A rank raised, died or hangs; with its traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, args))
        answers = self._collect(case.__name__, timeout, lost)
        failed = [(rank, text) for rank, (ok, text) in enumerate(answers) if not ok]
        if failed:
            self.kill()  # the others may be out of step
            report = "\n".join(f"--- rank {rank}\n{text}" for rank, text in failed)
            raise RankFailure(
                f"{case.__name__} failed on {len(failed)} of {self.size} ranks\n{report}"
            )
        return [value for _, value in answers]

    def kill(self) -> None:
        """Ends all ranks at once; the next run starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def close(self, lost: int | None = None) -> None:
        """Lets all ranks end in order; raises where one does not within 20 seconds.

        Args:
            lost: A rank that died.
        """
        for rank, pipe in enumerate(self._pipes):
            if rank != lost:
                pipe.send(None)
        deadline = time.monotonic() + 20
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for rank, process in enumerate(self._processes) if rank != lost]
        self.kill()
        if any(codes):
            raise RankFailure(f"ranks ended with {codes}")


class Worlds:
    """Worlds by size, each spawned when a test first asks for it."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        return self._worlds.setdefault(size, World(size))

    def close(self) -> None:
        """Ends all ranks; raises where some do not end in order."""
        for world in self._worlds.values():
            world.close()
