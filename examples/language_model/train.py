"""Trains the byte transformer with each method; run by torchrun, one process per worker.

The part to copy into a training script of your own is `build`: four lines turn a DDP model into
one whose workers send a bit per parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import struct
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Batches, load_text, split, validation_set
from lion import Lion
from methods import CODECS, METHODS, Method, Settings
from model import ByteTransformer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import pydist

VALIDATIONS = 12  # points of a curve
TRAINED = METHODS | CODECS


@dataclass
class Point:
    """One point of a learning curve.

    Attributes:
        step: Steps made.
        bytes_sent: Bytes a worker had sent by then, as the kernel counts them on its connections.
        validation_loss: Nats a byte.
    """

    step: int
    bytes_sent: float
    validation_loss: float


def build(
    method: str, model: ByteTransformer, settings: Settings, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wraps the model and makes the optimizer of a method."""
    m = TRAINED[method]
    lr = settings.learning_rate or m.lr
    if m.sharded:
        return shard(m, model, lr, settings)
    # The model's only buffer is a constant; broadcasting it would cost more than the votes.
    devices = [device.index] if device.type == "cuda" else None
    ddp = DDP(model, device_ids=devices, broadcast_buffers=False)
    if m.codec is not None:
        pydist.ddp.compress(
            ddp, m.codec, error_feedback=m.error_feedback, momentum=m.correction, seed=settings.seed
        )
    if m.frozen_after:
        return ddp, pydist.optim.OneBitAdam(
            ddp.module.named_parameters(),
            lr=lr,
            betas=m.betas,
            weight_decay=m.weight_decay,
            warmup_steps=round(m.frozen_after * settings.steps),
        )
    if m.sgd:
        return ddp, torch.optim.SGD(ddp.parameters(), lr=lr, momentum=m.betas[0])
    if method != "lion" and not m.aggregate:
        return ddp, torch.optim.AdamW(
            ddp.parameters(), lr=lr, betas=m.betas, weight_decay=m.weight_decay
        )
    if method == "lion":
        return ddp, Lion(ddp.parameters(), lr=lr, betas=m.betas, weight_decay=m.weight_decay)
    optimizer = pydist.optim.DistributedLion(
        ddp.module.named_parameters(),
        lr=lr,
        betas=m.betas,
        weight_decay=m.weight_decay,
        aggregate=m.aggregate,
        seed=settings.seed,
    )
    optimizer.attach(ddp)  # votes travel during backward
    return ddp, optimizer


def shard(
    m: Method, model: ByteTransformer, lr: float, settings: Settings
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Every block a unit of FSDP2, and the rest; what travels compressed after that."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if m.codec is not None:
        pydist.fsdp.compress(model, gradients=m.codec, parameters=m.weights, seed=settings.seed)
    return model, torch.optim.AdamW(
        model.parameters(), lr=lr, betas=m.betas, weight_decay=m.weight_decay
    )


def rate(step: int, settings: Settings) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def sent_bytes() -> int:
    """Bytes that this process has sent over its open TCP connections (0 where Linux is not)."""
    sent: dict[str, int] = {}
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            name = entry.readlink().name  # one socket may have several descriptors
            if name.startswith("socket:") and name not in sent:
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    # struct tcp_info of linux/tcp.h; tcpi_bytes_sent is there since Linux 4.19.
                    facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    (sent[name],) = struct.unpack_from("Q", facts, 200)
        except (OSError, struct.error):
            continue  # closed meanwhile, or not a TCP connection
    return sum(sent.values())


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each byte from those before it, in nats a byte."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def mean(value: float, device: torch.device) -> float:
    """Over all workers."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


@torch.no_grad()
def validate(model: ByteTransformer, tokens: Tensor) -> float:
    """Validation loss in nats a byte; every worker takes a share of the sequences."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = tokens[rank::world_size]
    total = torch.tensor([0.0, 0.0], dtype=torch.float64, device=tokens.device)
    for part in mine.split(64):
        total += torch.tensor([float(loss_of(model, part)) * len(part), len(part)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def train(
    method: str, settings: Settings, device: torch.device, progress: Progress | None
) -> dict[str, object]:
    """Trains one model; returns its curve and figures."""
    torch.manual_seed(settings.seed)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training, validation = split(load_text())
    tokens = validation_set(validation, settings.context).to(device)
    batches = Batches(
        training, rank, world_size, settings.batch_size, settings.context, settings.seed
    )
    model = ByteTransformer(settings.context, settings.width, settings.depth, settings.heads)
    ddp, optimizer = build(method, model.to(device), settings, device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    bar = progress.add_task(TRAINED[method].title, total=settings.steps) if progress else None

    sent, seconds, curve = 0.0, 0.0, [Point(0, 0.0, validate(model, tokens))]
    ends = [round(settings.steps * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)]
    step = 0
    for end in ends:
        dist.barrier()
        counter, start = sent_bytes(), time.perf_counter()
        while step < end:
            optimizer.zero_grad()
            # 1-bit Adam sends momenta, not gradients.
            quiet = TRAINED[method].frozen_after and isinstance(ddp, DDP)
            with ddp.no_sync() if quiet else nullcontext():
                loss_of(ddp, next(batches).to(device)).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if progress is not None and bar is not None:
                progress.update(bar, completed=step)
        dist.barrier()
        seconds += time.perf_counter() - start
        sent += mean(sent_bytes() - counter, device)
        dist.barrier()
        curve.append(Point(step, sent, validate(model, tokens)))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "method": method,
        "parameters": parameters,
        "curve": [asdict(point) for point in curve],
        "validation_loss": curve[-1].validation_loss,
        "bytes_measured": sent / settings.steps,
        "bytes_predicted": TRAINED[method].predicted_bytes(parameters, world_size),
        "seconds_per_step": seconds / settings.steps,
    }


def main() -> None:
    """Runs every method in turn; rank 0 writes the results."""
    # Its successor is not there in the oldest torch that pydist runs with.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="Settings as JSON")
    parser.add_argument("--methods", nargs="+", choices=TRAINED, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    settings = Settings(**json.loads(arguments.settings))

    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(1)  # the workers share the machine

    bar = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    first = dist.get_rank() == 0
    progress = Progress(TextColumn("{task.description:28}"), *bar) if first else None
    if progress:
        progress.start()
    results = [train(method, settings, device, progress) for method in arguments.methods]
    if progress:
        progress.stop()
        report = {"settings": asdict(settings), "workers": dist.get_world_size(), "runs": results}
        arguments.results.write_text(json.dumps(report, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
