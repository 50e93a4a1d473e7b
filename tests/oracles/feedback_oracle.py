"""What the DDP hook must do, in plain NumPy, by parameter: no buckets, shards or chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import ternary_oracle
import torch

from pydist import Sign, Ternary, TopK
from pydist.encoding.shares import share_of
from pydist.formats import wire
from pydist.formats.ternary import UNIT
from pydist.reference import blocks as rb
from pydist.reference import raw as rr
from pydist.reference import signs as ref
from pydist.reference import ternary as r3
from pydist.reference import topk as rt


@dataclass
class Kind:
    """One parameter: how it travels and what is kept of it.

    Attributes:
        ordinal: Its place in ``named_parameters()``.
        numel: Its elements.
        codec: ``None``: raw, in the gradient's type.
        feedback: It has residuals.
        first: It is the part of a parameter that begins there.
    """

    ordinal: int
    numel: int
    codec: Any
    feedback: bool
    first: int = 0

    def table(self, block: int) -> Any:
        """The segment table of all of it."""
        return wire.segments([self.numel], [self.ordinal], [self.first], block=block)


class Oracle:
    """The residuals of all ranks, and their steps.

    Args:
        kinds: The parameters by name.
        ranks: Number of ranks.
        seed: Seed of the draws.
        dtype: Type of the gradients.
        storage: Type of the residuals.
        owner: Owners keep residuals too.
        mean: Means, not sums.
        momentum: Workers' momentum.
        limit: The longest that a parameter's gradient may be on a rank.
        behind: Ranks whose sum each gradient is.
    """

    def __init__(
        self, kinds: dict[str, Kind], ranks: int, *, seed: int, dtype: str,
        storage: Any = "float32", owner: bool = True, mean: bool = True,
        momentum: float = 0.0, limit: float = math.inf, behind: int = 1,
    ) -> None:  # fmt: skip
        self.kinds, self.ranks, self.seed, self.mean = kinds, ranks, seed, mean
        self.dtype, self.storage, self.with_owner = dtype, storage, owner
        self.factor, self.limit = np.float32(momentum), limit
        self.divisor = np.float32(ranks * behind if mean else 1)

        def zeros() -> dict[str, Any]:
            return {name: np.zeros(kind.numel, np.float32) for name, kind in kinds.items()}

        self.worker = [zeros() for _ in range(ranks)]
        self.momenta = [zeros() for _ in range(ranks)]
        self.owner = zeros()

    def step(self, gradients: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """What all ranks hold afterwards, by name, from what each rank has."""
        result = {}
        for name, kind in self.kinds.items():
            entering = [self._entering(name, kind, g[name], r) for r, g in enumerate(gradients)]
            result[name] = ref.round_to(self._reduced(name, kind, entering, step), self.dtype)
        return result

    # ----------------------------------------------------------------- before it is encoded

    def change(self, kinds: dict[str, Kind]) -> None:
        """Other codecs from now on. Owners' elements that change owner are left to the old one."""
        for name, new in kinds.items():
            old, self.kinds[name] = self.kinds[name], new
            if not old.feedback or _unit(old) == _unit(new):
                continue
            weight = self.ranks if self.mean else 1
            for rank in range(self.ranks):
                leaves = _owned(old, rank, self.ranks)
                if new.feedback:
                    leaves &= ~_owned(new, rank, self.ranks)
                self.worker[rank][name][leaves] += self.owner[name][leaves] * np.float32(weight)
            stays = np.zeros(new.numel, dtype=bool)
            for rank in range(self.ranks if new.feedback else 0):
                stays |= _owned(old, rank, self.ranks) & _owned(new, rank, self.ranks)
            self.owner[name][~stays] = 0

    def _entering(self, name: str, kind: Kind, gradient: Any, rank: int) -> Any:
        """Clipped, with momentum, and with what is left where no residual is kept any more."""
        if not gradient.any():
            return gradient
        gradient = clipped(gradient, self.limit, self.dtype)
        if self.factor:
            new = self.factor * self.momenta[rank][name] + gradient
            self.momenta[rank][name] = ref.round_to(new, self.storage)
            gradient = self.momenta[rank][name] if kind.feedback else new
        if kind.feedback:
            return gradient
        left, self.worker[rank][name] = self.worker[rank][name], np.zeros(kind.numel, np.float32)
        return ref.round_to(gradient + left if left.any() else gradient, self.dtype)

    def _mask(self, name: str, payload: Any, form: Any, table: Any, rank: int) -> None:
        """Momentum factor masking."""
        held = self.momenta[rank]
        held[name] = rt.clear(held[name], payload, form, segments=table)

    # ----------------------------------------------------------------- by codec

    def _reduced(self, name: str, kind: Kind, gradients: list[Any], step: int) -> Any:
        if kind.numel == 0:
            return np.zeros(0, dtype=np.float32)
        if isinstance(kind.codec, TopK):
            return self._largest(name, kind, gradients, step)
        if isinstance(kind.codec, Ternary):
            return self._trits(kind, gradients, step)
        if not hasattr(kind.codec, "block_format") or kind.codec.block_format is None:
            return self._unscaled(kind, gradients, step)
        form = kind.codec.block_format
        table = kind.table(form.block)
        payloads = []
        for rank, gradient in enumerate(gradients):
            how: dict[str, Any] = {
                "zero_bit": (rank + step) % 2, "draws": rb.Draws(self.seed, rank, 0, step),
                "segments": table,
            }  # fmt: skip
            payloads.append(self._worker(name, kind, gradient, rank, how))
        total = rb.sum_quantized(np.stack(payloads), form, kind.numel, segments=table)
        total = total / self.divisor
        how = {
            "zero_bit": step % 2, "draws": rb.Draws(self.seed, 0, 1, step), "segments": table
        }  # fmt: skip
        if kind.feedback and self.with_owner and any(g.any() for g in gradients):
            payload, self.owner[name], _ = rb.quantize_feedback(
                total, self.owner[name], form, storage=self.storage, **how
            )
        else:
            payload, _ = rb.quantize(total, form, **how)
        return rb.dequantize(payload, form, kind.numel, segments=table)

    def _worker(self, name: str, kind: Kind, gradient: Any, rank: int, how: dict[str, Any]) -> Any:
        form = kind.codec.block_format
        if not kind.feedback or not gradient.any():
            return rb.quantize(gradient, form, **how)[0]
        old = self.worker[rank][name]
        payload, new, _ = rb.quantize_feedback(gradient, old, form, storage=self.storage, **how)
        if self.storage == "float32":  # the rule once more, in words: e' = fl(fl(g + e) - sent)
            sent = rb.dequantize(payload, form, kind.numel, segments=how["segments"])
            assert np.array_equal(new, (gradient + old) - sent)
        self.worker[rank][name] = new
        return payload

    def _largest(self, name: str, kind: Kind, gradients: list[Any], step: int) -> Any:
        form, n = kind.codec.topk_format, kind.numel
        table = kind.table(form.block)
        how: dict[str, Any] = {"seed": self.seed, "step": step, "segments": table}

        def kept(p: Any, old: Any) -> tuple[Any, Any]:
            payload, new, _ = rt.feedback(p, old, form, storage=self.storage, **how)
            if self.storage == "float32":  # the rule in words, as in _worker
                sent = rt.scatter(payload[None], form, n, segments=table)
                assert np.array_equal(new, (p + old) - sent)
            return payload, new

        payloads = []
        for rank, gradient in enumerate(gradients):
            if kind.feedback and gradient.any():
                payload, self.worker[rank][name] = kept(gradient, self.worker[rank][name])
                self._mask(name, payload, form, table, rank)
            else:
                payload, _ = rt.select(gradient, form, **how)
            payloads.append(payload)
        total = rt.scatter(np.stack(payloads), form, n, segments=table) / self.divisor
        if kind.feedback and self.with_owner and any(g.any() for g in gradients):
            payload, self.owner[name] = kept(total, self.owner[name])
        else:
            payload, _ = rt.select(total, form, **how)
        return rt.scatter(payload[None], form, n, segments=table)

    def _trits(self, kind: Kind, gradients: list[Any], step: int) -> Any:
        assert not kind.feedback
        n, table = kind.numel, kind.table(UNIT)
        payloads, shared = ternary_oracle.payloads(
            [torch.from_numpy(g) for g in gradients], kind.codec.clip, self.seed, step, table
        )
        sums = r3.sum_payloads(payloads, n, segments=table)
        return r3.values_of_sums(sums, shared, n, ranks=self.ranks, mean=self.mean, segments=table)[
            0
        ]

    def _unscaled(self, kind: Kind, gradients: list[Any], step: int) -> Any:
        if isinstance(kind.codec, Sign):
            votes = [
                2.0 * ref.sign_bits(g, (rank + step) % 2) - 1.0 for rank, g in enumerate(gradients)
            ]
            total = np.sum(votes, axis=0).astype(np.float32)
            return total / np.float32(self.ranks) if self.mean else total  # a node has one voice
        storage = getattr(kind.codec, "dtype", None) or self.dtype
        values = np.stack([ref.round_to(g, storage) for g in gradients])
        return ref.round_to(rr.sum_values(values, "float32")[0] / self.divisor, storage)


def _unit(kind: Kind) -> int:
    """Elements of a unit that has one owner; 0 without residuals."""
    if not kind.feedback:
        return 0
    form = getattr(kind.codec, "topk_format", None) or kind.codec.block_format
    return int(form.block)


def _owned(kind: Kind, rank: int, ranks: int) -> Any:
    """Which elements a rank owns where every rank reduces a share."""
    first, last = share_of(kind.numel, kind.ordinal, _unit(kind), rank, ranks)
    owned = np.zeros(kind.numel, dtype=bool)
    owned[first:last] = True
    return owned


def clipped(gradient: Any, limit: float, dtype: str) -> Any:
    """A gradient that is at most so long, in its type."""
    length = math.sqrt(_halved([float(x) * float(x) for x in gradient]))
    if length <= limit:
        return gradient
    return ref.round_to(gradient * np.float32(limit / length), dtype)


def _halved(values: list[float]) -> float:
    """The sum, the second half always added to the first, which is the longer one."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        second = values[half:]
        values = [x + y for x, y in zip(values, second, strict=False)] + values[len(second) : half]
    return values[0] if values else 0.0
