"""What the DDP hook must do, in plain NumPy, by parameter: no buckets, shards or chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ternary_oracle
import torch

from pydist import Sign, Ternary, TopK, wire
from pydist import reference as ref
from pydist import reference_blocks as rb
from pydist import reference_raw as rr
from pydist import reference_ternary as r3
from pydist import reference_topk as rt
from pydist.ternary import UNIT


@dataclass
class Kind:
    """One parameter: how it travels and what is kept of it.

    Attributes:
        ordinal: Its place in ``named_parameters()``.
        numel: Its elements.
        codec: ``None``: raw, in the gradient's type.
        feedback: It has residuals.
    """

    ordinal: int
    numel: int
    codec: Any
    feedback: bool


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
    """

    def __init__(
        self, kinds: dict[str, Kind], ranks: int, *, seed: int, dtype: str,
        storage: Any = "float32", owner: bool = True, mean: bool = True,
    ) -> None:  # fmt: skip
        self.kinds, self.ranks, self.seed, self.mean = kinds, ranks, seed, mean
        self.dtype, self.storage, self.with_owner = dtype, storage, owner
        kept = {name: kind.numel for name, kind in kinds.items() if kind.feedback}
        self.worker = [
            {name: np.zeros(n, dtype=np.float32) for name, n in kept.items()} for _ in range(ranks)
        ]
        self.owner = {name: np.zeros(n, dtype=np.float32) for name, n in kept.items()}

    def step(self, gradients: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """What all ranks hold afterwards, by name, from what each rank has."""
        return {
            name: ref.round_to(
                self._reduced(name, kind, [g[name] for g in gradients], step), self.dtype
            )
            for name, kind in self.kinds.items()
        }

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
        table = wire.segments([kind.numel], [kind.ordinal], block=form.block)
        payloads = []
        for rank, gradient in enumerate(gradients):
            how: dict[str, Any] = {
                "zero_bit": (rank + step) % 2, "draws": rb.Draws(self.seed, rank, 0, step),
                "segments": table,
            }  # fmt: skip
            payloads.append(self._worker(name, kind, gradient, rank, how))
        total = rb.sum_quantized(
            np.stack(payloads), form, kind.numel, mean=self.mean, segments=table
        )
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
        table = wire.segments([n], [kind.ordinal], block=form.block)
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
            else:
                payload, _ = rt.select(gradient, form, **how)
            payloads.append(payload)
        total = rt.scatter(np.stack(payloads), form, n, mean=self.mean, segments=table)
        if kind.feedback and self.with_owner and any(g.any() for g in gradients):
            payload, self.owner[name] = kept(total, self.owner[name])
        else:
            payload, _ = rt.select(total, form, **how)
        return rt.scatter(payload[None], form, n, segments=table)

    def _trits(self, kind: Kind, gradients: list[Any], step: int) -> Any:
        assert not kind.feedback
        n, table = kind.numel, wire.segments([kind.numel], [kind.ordinal], block=UNIT)
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
            return total / np.float32(self.ranks) if self.mean else total
        storage = getattr(kind.codec, "dtype", None) or self.dtype
        values = np.stack([ref.round_to(g, storage) for g in gradients])
        return rr.sum_values(values, storage, mean=self.mean)[0]
