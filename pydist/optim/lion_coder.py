"""Votes of Distributed Lion and signSGD in messages: packed from gradients, applied to weights.

Parameters stay where they are. A table of rows (:mod:`pydist.formats.wire`) tells the kernels where
each gradient, momentum and parameter lies and which bits of the payload are its own, so that one
call handles thousands of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pydist.encoding.rows import Job
from pydist.encoding.signs import SignRows, VoteRule
from pydist.formats import wire
from pydist.formats.wire import IntArray
from pydist.kernels import checks
from pydist.kernels.checks import FLOATS
from pydist.kernels.launch import launch
from pydist.kernels.lion import LionOptions, lion_apply_args
from pydist.kernels.torch_tensors import moved, on_device_of
from pydist.optim.layout import any_rank_has, in_order, memory_of, which_has
from pydist.transport.coder import BareCoder, Worker, spans


@dataclass
class Entry:
    """One parameter's part in a vote.

    Attributes:
        ordinal: The parameter's place in the optimizer.
        param: The parameter.
        order: Its memory order: the strides of gradient and momentum.
        grad: Its gradient; ``None`` where this rank has none.
        momentum: Its momentum; ``None`` votes the gradient's sign.
        momentum_out: Where the new momentum goes; ``momentum`` itself for in place.
        beta1: Weight of the old momentum in the vote.
        beta2: Weight of the old momentum in the new one.
    """

    ordinal: int
    param: Tensor
    order: tuple[int, ...]
    grad: Tensor | None
    momentum: Tensor | None
    momentum_out: Tensor | None
    beta1: float
    beta2: float


@dataclass(frozen=True)
class Scalars:
    """What a vote needs beside the tensors.

    Attributes:
        rank: This rank.
        ranks: Number of voters.
        step: Step of the vote.
        binarization_range: See :class:`pydist.kernels.lion.LionOptions`.
        threads: CPU threads.
        ask_usage: Ranks may lack gradients, so they tell each other which they have; where they
            cannot (DDP without ``find_unused_parameters``), nothing is asked.
    """

    rank: int
    ranks: int
    step: int
    binarization_range: float | None
    threads: int
    ask_usage: bool = True


def dtype_name(x: Tensor) -> str:
    """Such as ``"float32"``."""
    return str(x.dtype)[6:]


class LionCoder(BareCoder):
    """The votes of a list of parameters.

    Every rank also says which of the parameters it has a gradient for (one bit each); a parameter
    that no rank used keeps value and momentum. A rank without a gradient votes as with a gradient
    of zero as long as others have one.

    Args:
        entries: The parameters, in the order of their bits.
        rule: How votes become a result.
        scalars: Rank, step and the like.

    Attributes:
        used: Which entries any rank has a gradient for; known when the call is complete.
        flags: int32[1]: flags of this rank, then of all ranks.
    """

    codec = SignRows.number
    unit_bytes = SignRows.unit_bytes
    repeatable = False  # packing moves the momenta

    def __init__(self, entries: Sequence[Entry], rule: VoteRule, scalars: Scalars) -> None:
        self.entries = list(entries)
        table = wire.segments(
            [entry.param.numel() for entry in self.entries],
            [entry.ordinal for entry in self.entries],
        )
        device = self.entries[0].param.device if self.entries else torch.device("cpu")
        worker = Worker(scalars.rank, scalars.ranks, scalars.step, scalars.threads)
        self.rule, self.scalars, self.worker, self.device = rule, scalars, worker, device
        self.rows = wire.rows_of(table)
        self.units = wire.segments_words(table)
        self.job = Job(worker, False, rule.seed, device)
        self.signs = SignRows(rule, scalars.ranks)
        self.bits = self.signs.bits
        self.message_bytes, self.reduced_bytes = self.signs.row_bytes, self.signs.reduced_bytes
        self.flags, self.all_flags = self.job.flags, self.job.all_flags
        self._memory = [memory_of(entry.param) for entry in self.entries]
        self._with_grad = np.array([entry.grad is not None for entry in self.entries], dtype=bool)
        self.used: np.ndarray = self._with_grad
        self._deferred: list[tuple[int, Tensor]] = []
        self._substitute_missing()
        self._pack_calls = self._group_for_packing()
        self._packed: Tensor | None = None

    def _substitute_missing(self) -> None:
        """Gives entries without a gradient a zero one.

        Their new momentum is kept aside until it is known that some rank used them.
        """
        for i in np.flatnonzero(~self._with_grad):
            entry = self.entries[i]
            entry.grad = torch.zeros_like(entry.param)
            if entry.momentum is None:
                continue
            entry.momentum_out = torch.empty_like(entry.momentum)
            self._deferred.append((int(i), entry.momentum_out))

    def _group_for_packing(self) -> list[tuple[IntArray, str, str, LionOptions]]:
        """Rows that one kernel call can handle: same dtypes, same betas."""
        groups: dict[tuple[str, str, float, float], list[int]] = {}
        for i, entry in enumerate(self.entries):
            assert entry.grad is not None
            self.rows[i, wire.X] = entry.grad.data_ptr()
            momentum = ""
            if entry.momentum is not None and entry.momentum_out is not None:
                self.rows[i, wire.MOMENTUM] = entry.momentum.data_ptr()
                self.rows[i, wire.MOMENTUM_OUT] = entry.momentum_out.data_ptr()
                momentum = dtype_name(entry.momentum)
            key = (dtype_name(entry.grad), momentum, entry.beta1, entry.beta2)
            groups.setdefault(key, []).append(i)
        s = self.scalars
        calls = []
        for (grad, momentum, beta1, beta2), indices in groups.items():
            options = LionOptions(
                beta1, beta2, (s.rank + s.step) % 2, s.binarization_range,
                self.rule.seed, s.rank, s.step,
            )  # fmt: skip
            calls.append((self.rows[indices], grad, momentum, options))
        return calls

    # ----------------------------------------------------------------- Coder

    def metadata(self) -> Tensor | None:
        """One bit per parameter: does this rank have a gradient for it?"""
        if not self.scalars.ask_usage:
            return None
        return which_has(self._with_grad)

    def merge_metadata(self, all_metadata: Tensor) -> None:
        """A parameter is used where any rank has a gradient for it."""
        self.used = any_rank_has(all_metadata, len(self.entries))

    def pack(self) -> None:
        """Packs everything now: the gradients may change as soon as this returns."""
        with on_device_of(self.flags):
            self._packed = self._pack(0, self.units)

    def packed(self, begin: int, end: int) -> Tensor:
        """Votes and new momenta of the elements behind words ``begin`` … ``end``."""
        if self._packed is not None:
            return self._packed[begin * wire.WORD_BYTES : end * wire.WORD_BYTES]
        return self._pack(begin, end)

    def _pack(self, begin: int, end: int) -> Tensor:
        size = (end - begin) * wire.WORD_BYTES
        payload = torch.empty(size, dtype=torch.uint8, device=self.device)
        for rows, grad, momentum, options in self._pack_calls:
            widths = (checks.ITEMSIZE[grad], checks.ITEMSIZE[momentum] if momentum else 0)
            part = wire.cut_rows(rows, begin, end, widths)
            part[:, wire.WORD] -= begin
            target, flags = self.job.target(payload), self.flags.data_ptr()
            if momentum:
                launch(
                    target, "lion_pack", part, FLOATS[grad], FLOATS[momentum], payload.data_ptr(),
                    options.native(), flags,
                )  # fmt: skip
            else:
                launch(
                    target, "pack_signs", part, FLOATS[grad], payload.data_ptr(),
                    options.zero_bit, flags,
                )  # fmt: skip
        return payload

    def encode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Packs the votes at once and deals them out to the shards."""
        payload = self.packed(begin, end)
        for row, (first, last) in zip(
            shards, spans(len(shards), units, 0, end - begin), strict=True
        ):
            size = (last - first) * wire.WORD_BYTES
            row[:size] = payload[first * wire.WORD_BYTES :][:size]
            row[size:] = 0

    def reduce(
        self, messages: Tensor, out: Tensor, units: int, begin: int, end: int, flags: Tensor
    ) -> None:
        """Counts the votes of a shard, or finds the majority."""
        rows = wire.cut_rows(self.rows, begin, end)
        rows[:, wire.WORD] -= begin
        place = self.signs.reduced_place(out.zero_().unsqueeze(0), units, zeroed=True)
        self.signs.reduce(self.job, rows, self.signs.source(messages, units), place, flags)

    @cached_property
    def planes(self) -> Tensor:
        """The voted planes of the whole call, uint8 [planes, bytes]."""
        shape = (self.bits, self.units * wire.WORD_BYTES)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def decode(self, shards: Tensor, units: int, begin: int, end: int) -> None:
        """Keeps the planes."""
        planes = shards.reshape(len(shards), self.bits, -1).transpose(0, 1).reshape(self.bits, -1)
        begin, end = begin * wire.WORD_BYTES, end * wire.WORD_BYTES
        self.planes[:, begin:end].copy_(planes[:, : end - begin], non_blocking=True)

    def finish(self, flags: Tensor) -> None:
        """Keeps the flags of all ranks; the optimizer applies the planes."""
        self.flags = moved(flags, self.device)

    # ----------------------------------------------------------------- after the vote

    def check_unmoved(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raises RuntimeError where a parameter is no longer where and what it was at the vote.

        Args:
            params: What this rank has of all parameters now, by ordinal.
            names: Their names.
        """
        for entry, memory in zip(self.entries, self._memory, strict=True):
            now = params[entry.ordinal]
            if now is not entry.param or memory_of(now) != memory:
                raise RuntimeError(
                    f"{names[entry.ordinal]} was moved or replaced between backward and step()"
                )

    def commit_deferred(self, skip: Tensor | None) -> None:
        """Momenta of parameters that only other ranks used take their step.

        Args:
            skip: int32[1] on the parameters' device; where it is not 0, nothing is changed.
        """
        for i, momentum in self._deferred:
            if self.used[i]:
                old = self.entries[i].momentum
                assert old is not None
                old.copy_(momentum if skip is None else torch.where(skip != 0, old, momentum))

    def apply(self, scalars: Sequence[tuple[float, float]], skip: Tensor | None) -> None:
        """Updates the parameters that any rank used.

        Args:
            scalars: Learning rate and weight decay of each entry.
            skip: int32[1] on the parameters' device; where it is not 0, nothing is changed.
        """
        if self.planes.is_cuda:  # made on the exchange's side stream, read on this one
            self.planes.record_stream(torch.cuda.current_stream(self.planes.device))
        groups: dict[tuple[str, float, float], list[int]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for i in np.flatnonzero(self.used):
            param = in_order(self.entries[i].param, self.entries[i].order)
            if param is not self.entries[i].param:  # its memory format was changed
                copies.append((self.entries[i].param, param))
            self.rows[i, wire.X] = param.data_ptr()
            groups.setdefault((dtype_name(param), *scalars[int(i)]), []).append(int(i))
        ranks = self.worker.ranks if self.rule.average else None
        address = 0 if skip is None else skip.data_ptr()
        for (dtype, lr, weight_decay), indices in groups.items():
            args = lion_apply_args(lr, weight_decay, self.bits, self.units * wire.WORD_BYTES, ranks)
            rows = self.rows[indices]
            with on_device_of(self.planes):
                launch(
                    self.job.target(self.planes), "lion_apply", rows, FLOATS[dtype],
                    self.planes.data_ptr(), args, address,
                )  # fmt: skip
        for param, copied in copies:
            param.copy_(copied)
        torch.autograd.graph.increment_version(
            [self.entries[i].param for i in np.flatnonzero(self.used)]
        )
