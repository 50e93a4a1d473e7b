"""Whether parameters that must be replicas are: their checksums, compared over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pydist.training.dtensor import local_of
from pydist.transport.communicator import Call, communicator
from pydist.transport.message import crc32c


def checksum(x: Tensor) -> int:
    """CRC32C of a tensor's elements on this rank; memory order and device do not matter."""
    flat = local_of(x).detach().contiguous().view(-1).cpu()
    return crc32c(flat.view(torch.uint8))


def checksums(names: Sequence[str], params: Sequence[Tensor]) -> dict[str, int]:
    """What ranks compare (:class:`pydist.transport.communicator.Call`), so that an error has names.

    Tensors of classes of their own, such as quantized ones, are left out: their memory is secret.
    """
    return {
        f"checksum of the values of {name}": checksum(p)
        for name, p in zip(names, params, strict=True)
        if type(local_of(p)) in (Tensor, torch.nn.Parameter) and not p.is_meta
    }


def check_replicas(
    params: torch.nn.Module | Iterable[tuple[str, Tensor]],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Compares parameters over the ranks; collective.

    Each rank computes a CRC32C of each parameter (27 GB/s in memory; on CUDA after a copy to the
    host) and sends 16 bytes. Ranks that differ tell each other the checksums, no more.

    Args:
        params: The model, or named parameters, in the same order on all ranks; frozen ones
            count. Of DTensors this rank's part, so ``group`` must then be the ranks with the same
            part.
        group: Process group; ``None`` is the world.

    Raises:
        MismatchError: A parameter differs; names parameters and ranks, on every rank.
    """
    named = params.named_parameters() if isinstance(params, torch.nn.Module) else params
    pairs = list(named)
    comm = communicator(group)
    fields = checksums([name for name, _ in pairs], [p for _, p in pairs])
    call = Call("check_replicas", {"parameters": len(pairs), **fields})
    comm.run(lambda: comm.agree(call))
