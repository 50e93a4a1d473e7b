"""DDP's communication hooks on one card: times, waits for the device, and a profile.

    python bench/gpu/hook.py --json hook.json                # two ranks on cuda:0, over gloo
    python bench/gpu/hook.py --device cpu --json out.json    # the same on the CPU, small

Two ranks share the card, since NCCL refuses that and gloo does not: what is measured is the hook's
own work, not a network. pydist's hooks run twice: with messages on the host, as over gloo, and with
messages on the device, as over NCCL. Of each: the median of a step, the waits that torch sees
(``torch.cuda.set_sync_debug_mode``) with their lines and threads, and what a profile of one step
holds: operations of the device, and calls that wait.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

RANKS = 2
SHAPE = {"cuda": (1024, 1024), "cpu": (64, 64)}
SMALLER = {"cuda": 1, "cpu": 256}  # buckets
PARAMETERS = 13  # of 4 MiB: two buckets of 25 MB and a rest
WARM_UP, TIMED = 3, 5
START_SECONDS = 60.0  # until the first answer, imports and all
METHOD_SECONDS = 15.0  # ranks that take longer for a method hang
WAITING_CALLS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True)
class Method:
    """A way to reduce gradients.

    Attributes:
        name: For the table.
        install: Registers it with a DDP model.
        on_device: Whether pydist's messages stay on the device.
        bucket_mb: Megabytes of a bucket.
    """

    name: str
    install: Callable[[Any], Any]
    on_device: bool = False
    bucket_mb: float = 25.0


def methods() -> list[Method]:
    """All of them: torch's own, then pydist's."""
    import pydist
    from pydist import QSGD, BlockInt, Sign, Ternary, TopK

    found = [
        Method("all-reduce", lambda ddp: None),
        Method("torch fp16 hook", _fp16),
        # Over gloo it deadlocks as soon as two buckets are in flight.
        Method("torch PowerSGD hook, rank 2, one bucket", _power_sgd, bucket_mb=1e3),
    ]
    codecs = {
        "QSGD(8)": QSGD(8), "BlockInt(4)": BlockInt(4), "Sign(None)": Sign(None),
        "TopK(0.001)": TopK(0.001), "Ternary()": Ternary(),
    }  # fmt: skip
    for on_device in (True, False):
        for name, codec in codecs.items():

            def install(ddp: Any, codec: Any = codec) -> Any:
                return pydist.ddp.compress(ddp, codec)

            where = "device" if on_device else "host"
            found.append(Method(f"pydist {name}, messages on the {where}", install, on_device))
    return found


def _fp16(ddp: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)


def _power_sgd(ddp: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=2
    )
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


# --------------------------------------------------------------------------- one rank


def model(device: str) -> Any:
    """Parameters whose gradients are given, so that backward is the hook's alone."""
    import torch

    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            shapes = [SHAPE[device]] * PARAMETERS
            self.parts = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)

        def forward(self, given: list[Any]) -> Any:
            return sum((p * g).sum() for p, g in zip(self.parts, given, strict=True))

    return Given().to(device)


class Waits:
    """Lines at which torch saw a wait for the device, with the kind of thread."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts within it; on the CPU there are none."""
        import torch

        if not torch.cuda.is_available():
            yield
            return
        usual = warnings.showwarning
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
                warnings.showwarning = usual

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "synchroniz" not in str(message):
            return
        name = threading.current_thread().name
        where = name if name.startswith("pydist-") else "calling thread"
        parts = Path(filename).parts
        file = "/".join(parts[parts.index("pydist") :] if "pydist" in parts else parts[-2:])
        self.found[f"{file}:{lineno}, {where}"] += 1


def profile(step: Callable[[], None]) -> dict[str, Any]:
    """A profile of one step: what the device did, calls that wait, and the longest entries."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    device = Counter(
        _kind(event.name)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    calls = Counter(event.name for event in profiled.events() if event.name in WAITING_CALLS)
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)
    return {"device_operations": dict(device), "waiting_calls": dict(calls), "table": table}


def _kind(name: str) -> str:
    for kind in ("Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD", "Memset"):
        if name.startswith(kind):
            return kind
    return "kernel"


def measured(method: Method, device: str) -> dict[str, Any]:
    """One method on this rank."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from pydist.transport.communicator import communicator

    net = model(device)
    ddp = DistributedDataParallel(net, bucket_cap_mb=method.bucket_mb / SMALLER[device])
    communicator(device=device).device_side = method.on_device  # as if it had NCCL
    method.install(ddp)
    generator = torch.Generator(device).manual_seed(1)
    given = [torch.randn(p.shape, device=device, generator=generator) for p in net.parameters()]

    def step() -> None:
        for p in net.parameters():
            p.grad = None
        ddp(given).backward()

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(WARM_UP + TIMED):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    waits = Waits()
    with waits.counted():
        step()
    synchronize()
    found = {
        "name": method.name,
        "seconds": statistics.median(seconds[WARM_UP:]),
        "waits": dict(waits.found),
        **profile(step),
    }
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters()), "not finite"
    return found


def rank_main(rank: int, device: str, store: str, queue: Any, first: int, seconds: float) -> None:
    """Measures method after method, from the ``first`` on; rank 0 says what it found."""
    import torch
    import torch.distributed as dist

    start = time.monotonic()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for method in methods()[first:]:
        late = torch.tensor([time.monotonic() - start > seconds])
        dist.broadcast(late, 0)  # all ranks end after the same method
        if late:
            break
        try:
            found = measured(method, device)
        except Exception as error:  # the other rank may hang now: the parent ends both
            found = {"name": method.name, "error": f"{type(error).__name__}: {error}"[:300]}
            queue.put(found)
            return
        if rank == 0:
            queue.put(found)
    if rank == 0:
        queue.put(None)
    dist.destroy_process_group()


# --------------------------------------------------------------------------- both


def shown(found: list[dict[str, Any]]) -> list[str]:
    """A line per method."""
    lines = [f"{'hook, two ranks on one device':<45} {'ms':>8} {'waits':>6} {'device ops':>11}"]
    for row in found:
        if "seconds" not in row:
            lines.append(f"{row['name']:<45} {row.get('error') or row['left_out']}")
            continue
        lines.append(
            f"{row['name']:<45} {1e3 * row['seconds']:>8.2f} {sum(row['waits'].values()):>6} "
            f"{sum(row['device_operations'].values()):>11}"
        )
    return lines


def where_it_waits(found: list[dict[str, Any]]) -> list[str]:
    """The lines that wait, of all methods of pydist."""
    total: Counter[str] = Counter()
    for row in found:
        if row["name"].startswith("pydist"):
            total.update(row.get("waits", {}))
    return [f"{count:>4} waits at {line}" for line, count in total.most_common(12)]


def measure_all(device: str, seconds: float, save: Callable[[list[Any]], None]) -> list[Any]:
    """Every method; where one fails or hangs, new ranks go on with the next.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        seconds: Begin no method after so long.
        save: Told of all that was found so far.
    """
    names = [method.name for method in methods()]
    end = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    while len(found) < len(names):
        left = end - time.monotonic()
        answers = ranks_from(len(found), device, left) if left > 0 else iter(())
        before = len(found)
        for answer in answers:
            found.append(answer or {"name": names[len(found)], "error": "no answer"})
            save(found)
        if len(found) == before:  # no time left
            found += [{"name": name, "left_out": "no time left"} for name in names[before:]]
            save(found)
    return found


def ranks_from(first: int, device: str, seconds: float) -> Iterator[dict[str, Any] | None]:
    """What new ranks find, from the ``first`` method on; None, last, where they hang."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=rank_main, daemon=True,
                args=(rank, device, f"{folder}/store", queue, first, seconds),
            )
            for rank in range(RANKS)
        ]  # fmt: skip
        for process in ranks:
            process.start()
        limit = START_SECONDS
        try:
            while (answer := queue.get(timeout=limit)) is not None:
                yield answer
                limit = METHOD_SECONDS
                if "error" in answer:
                    return
        except Empty:
            yield None
        finally:
            for process in ranks:
                process.join(timeout=1)
                process.kill()


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="DDP's hooks on one card, two ranks.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=25.0, help="begin no method after this")
    options = parser.parse_args()

    def save(found: list[Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    found = measure_all(options.device, options.budget, save)
    for row in found:
        if "table" in row:
            print(f"\n{row['name']}: {row['device_operations']} {row['waiting_calls']}")
            print(row["table"])
    print("\n".join([*where_it_waits(found), *shown(found)]))
    failed = [row["name"] for row in found if "error" in row]
    measured = sum("seconds" in row for row in found)
    print(
        f"{measured} of {len(found)} methods measured" + (f", failed: {failed}" if failed else "")
    )
    return 1 if failed or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
