"""torchft: a process group whose all-reduce is compressed, and which a new quorum reconfigures.

    inside = ProcessGroupGloo(timeout=timedelta(seconds=20))
    manager = Manager(pg=CompressedProcessGroup(inside, pydist.QSGD(bits=8)), ...)

Everything but sums and means of floats goes to the group inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions
from torch.distributed import AllreduceOptions, ReduceOp, Work
from torchft.process_group import ProcessGroup, ProcessGroupWrapper
from torchft.work import _DummyWork

import pydist

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CompressedProcessGroup(ProcessGroupWrapper):
    """Sums and means of float tensors in a codec; everything else goes to the group inside.

    1. Every rank encodes a share of the tensor for each rank, and sends it there.
    2. The owner decodes all ranks' payloads, adds them in rank order, and encodes the sum again.
    3. All gather the owners' payloads and decode the same bytes.

    Args:
        group: torchft's process group, which can be reconfigured.
        codec: One with blocks: ``QSGD``, ``BlockInt``, ``BlockFloat`` or a scaled ``Sign``.
        min_numel: Lists with a smaller tensor go to the group inside.
    """

    def __init__(self, group: ProcessGroup, codec: Any, *, min_numel: int = 1024) -> None:
        super().__init__(pg=group)
        if getattr(codec, "block_format", None) is None or getattr(codec, "entropy", None):
            raise TypeError(
                f"codec must be one with blocks and without entropy coding, got {codec!r}"
            )
        self.codec, self.min_numel, self.step = codec, min_numel, 0

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """A new quorum: all its ranks begin with the same step of the random draws."""
        super().configure(*args, **kwargs)
        self.step = 0

    def allreduce(self, tensors: list[Tensor], opts: AllreduceOptions | ReduceOp) -> Work:
        """Reduces each tensor in place."""
        op: Any = opts.reduceOp if isinstance(opts, AllreduceOptions) else opts
        fits = all(x.dtype in DTYPES and x.numel() >= self.min_numel for x in tensors)
        known = op == ReduceOp.SUM or op == ReduceOp.AVG  # no `in`: torch's == is one-sided
        if not (known and fits):
            return super().allreduce(tensors, opts)
        for x in tensors:
            x.copy_(self._reduced(x.reshape(-1), mean=op == ReduceOp.AVG).view_as(x))
        return _DummyWork(tensors)

    def _reduced(self, x: Tensor, *, mean: bool) -> Tensor:
        ranks, rank, step = self._pg.size(), self._pg.rank(), self.step
        self.step += 1
        block = self.codec.block
        share = -(-x.numel() // (ranks * block)) * block
        flat = x.new_zeros(share * ranks)
        flat[: x.numel()] = x
        # Draws depend on (rank, step, element): each share's step is another one.
        sent = torch.stack(
            [
                pydist.ops.quantize(part, self.codec, rank=rank, step=step * ranks + i)
                for i, part in enumerate(flat.view(ranks, share))
            ]
        )
        received = torch.empty_like(sent)
        self._pg.alltoall_base(received, sent, [], [], AllToAllOptions()).wait()
        mine = pydist.ops.reduce_quantized(
            received, self.codec, share, mean=mean, rank=rank, phase=1, step=step
        )
        everyones = [torch.empty_like(mine) for _ in range(ranks)]
        self._pg.allgather([everyones], [mine], AllgatherOptions()).wait()
        parts = [pydist.ops.dequantize(p, self.codec, share, dtype=x.dtype) for p in everyones]
        return torch.cat(parts)[: x.numel()]
