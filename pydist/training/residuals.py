"""Error feedback: what a codec did not send this time is added to what it sends next time.

A worker keeps, for every parameter, the rest of what it encoded: ``p = g + e`` is encoded and
``e = p - sent`` is kept. The owner of a share of a parameter keeps the rest of what it encoded
again after the reduction. Both are keyed by parameter, so that neither rebuilt buckets nor other
bucket sizes touch them; which elements a rank owns depends on the parameter alone
(:mod:`pydist.encoding.shares`).

Sources: Seide et al. 2014 (1-bit SGD); Karimireddy et al., "Error Feedback Fixes SignSGD" (arXiv
1901.09847); the owner's side as in DoubleSqueeze (arXiv 1905.05957).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec, Raw, Ternary, TopK, is_custom
from pydist.encoding.bucket import Feedback, Section
from pydist.encoding.shares import Part
from pydist.training.momentum import Advanced, drop_damaged, is_damaged


def contracts(codec: Codec) -> bool:
    """Whether error feedback makes a codec better: the rule behind ``error_feedback="auto"``.

    It does where what is sent is always nearer to the value than nothing: signs with a scale, the
    largest entries, rounding to nearest, and random rounding between the levels of the largest
    magnitude from 3 bits on. With the other unbiased codecs the residual grows without bound.
    """
    if isinstance(codec, TopK):
        return True
    if is_custom(codec):
        return codec.contracts
    form = codec.block_format
    if form is None:
        return False
    return not form.stochastic or (form.norm == "max" and form.bits >= 3)


def forbids(codec: Codec) -> str | None:
    """Why a codec cannot have error feedback, where it cannot.

    For levels of the l2 norm of a block of m elements, s of each sign, the bound of the relative
    variance is ``min(m / s**2, sqrt(m) / s)`` (QSGD, arXiv 1610.02132); from 1 on the residual may
    grow with every step.
    """
    if isinstance(codec, Raw | TopK) or is_custom(codec):
        return None  # Raw has nothing to keep; of others their authors know
    if isinstance(codec, Ternary):
        return (
            f"{codec} rounds at random to one level for a whole layer: its relative variance grows "
            "with the square root of the layer's elements, and the residual would grow with it"
        )
    form = codec.block_format
    if form is None:
        return f"{codec} sends signs without a magnitude: what was lost is not defined"
    if not form.stochastic:
        return None
    if form.norm == "max":
        variance = 1.62 if form.bits == 2 else 0.0  # measured on normal values, block 512
    else:
        variance = min(form.block / form.levels**2, math.sqrt(form.block) / form.levels)
    if variance < 1:
        return None
    return (
        f"the relative variance of {codec} can reach {variance:.3g}: the residual would grow with "
        "every step"
    )


@dataclass
class OwnerShare:
    """What a rank keeps of one parameter as its owner.

    Attributes:
        first: The first element it is of.
        values: One entry an element, flat.
        whole: All ranks hold the same, of the whole parameter (``algorithm="all_gather"``).
    """

    first: int
    values: Tensor
    whole: bool

    @property
    def last(self) -> int:
        """One past the last element."""
        return self.first + self.values.numel()


class Residuals:
    """All residuals of one rank, flat in the memory order of their parameters.

    Args:
        dtype: float32, or bfloat16 for half the memory.
        ranks: Ranks of the group.
        mean: The collective takes means, not sums.

    Attributes:
        worker: By ordinal, what this rank did not send; of its part of a parameter alone, where it
            sends no more.
        owner: By ordinal, what it did not hand out of its share of a parameter.
    """

    def __init__(self, dtype: torch.dtype, ranks: int, mean: bool) -> None:
        self.dtype, self._mean = dtype, mean
        self.join(ranks)
        self.worker: dict[int, Tensor] = {}
        self.owner: dict[int, OwnerShare] = {}
        self._staged_worker: dict[int, Tensor] = {}
        self._staged_owner: dict[int, Tensor] = {}

    def join(self, ranks: int) -> None:
        """Learns how many ranks there are."""
        # The share of one rank's contribution in the result.
        self.weight = ranks if self._mean else 1

    def worker_of(self, part: Part, device: torch.device) -> Tensor:
        """A part's residual, on the device where its gradients are; zeros at first."""
        held = self.worker.get(part.ordinal)
        if held is None:
            held = torch.zeros(part.numel, dtype=self.dtype, device=device)
            self.worker[part.ordinal] = held
        elif held.device != device:
            held = self.worker[part.ordinal] = held.to(device)
        return held

    def owner_of(
        self, part: Part, bounds: tuple[int, int], whole: bool, device: torch.device
    ) -> Tensor:
        """The residual of this rank's share of a parameter.

        Elements that it owned before and does not own now leave for its worker residual, where they
        weigh as much in the next result as they would have here.

        Args:
            part: The parameter.
            bounds: Its first element that this rank owns, and one past the last.
            whole: Every rank reduces everything.
            device: Where messages are reduced.
        """
        first, last = bounds
        held = self.owner.get(part.ordinal)
        if held is not None and (held.first, held.last, held.whole) == (first, last, whole):
            if held.values.device != device:
                held.values = held.values.to(device)
            return held.values
        values = torch.zeros(last - first, dtype=self.dtype, device=device)
        self.owner[part.ordinal] = OwnerShare(first, values, whole)
        self._staged_owner.pop(part.ordinal, None)
        if held is None:
            return values
        begin, end = max(first, held.first), min(last, held.last)
        if whole:  # what the other ranks held of theirs is not here
            begin = end = first
        if begin < end:
            old = held.values[begin - held.first : end - held.first]
            values[begin - first : end - first] = old.to(device)
        if not held.whole:  # else its next owner has it too
            kept = (begin, end) if begin < end else (held.first, held.first)
            self._leave(part, held, (held.first, kept[0]))
            self._leave(part, held, (kept[1], held.last))
        return values

    def _leave(self, part: Part, held: OwnerShare, span: tuple[int, int]) -> None:
        begin, end = span
        if begin >= end:
            return
        values = held.values[begin - held.first : end - held.first]
        # Not in place: a step that is taken back needs what was there.
        whole = self.worker_of(part, values.device).clone()
        moved = values.to(whole.device, torch.float32) * self.weight
        here = whole[begin - part.first : end - part.first]
        here.copy_(here.float() + moved)
        self.worker[part.ordinal] = whole

    def release(self, part: Part, device: torch.device, rank: int) -> Tensor | None:
        """All that a parameter has left here, as what this rank did not send; ``None``: nothing.

        For a parameter that keeps no residuals any more. An owner's residual goes to its worker
        residual; one that all ranks hold goes to rank 0's. Nothing is lost until :meth:`drop`.
        """
        held = self.owner.pop(part.ordinal, None)
        self._staged_owner.pop(part.ordinal, None)
        if held is not None and (rank == 0 or not held.whole):
            self.worker_of(part, device)
            self._leave(part, held, (held.first, held.last))
        left = self.worker.get(part.ordinal)
        return left if left is not None and left.numel() else None

    def turn(self, part: Part, change: Callable[[Tensor], Tensor]) -> None:
        """Brings a parameter's residuals into another order of memory.

        An owner's elements are then other ones, so they leave for its worker residual.

        Args:
            part: The parameter.
            change: From the old order to a new tensor in the new one.
        """
        share = self.owner.pop(part.ordinal, None)
        if share is not None and share.whole:
            self.owner[part.ordinal] = replace(share, values=change(share.values))
        elif share is not None:
            self._leave(part, share, (share.first, share.last))
        if (held := self.worker.get(part.ordinal)) is not None:
            self.worker[part.ordinal] = change(held)
        self._staged_worker.pop(part.ordinal, None)
        self._staged_owner.pop(part.ordinal, None)

    def cut(self, ordinal: int, first: int, last: int) -> None:
        """Keeps these elements of a parameter's worker residual, where it is of more."""
        held = self.worker.get(ordinal)
        if held is not None and held.numel() != last - first:
            self.worker[ordinal] = held[first:last].clone()
            self._staged_worker.pop(ordinal, None)

    def drop(self, ordinal: int) -> None:
        """Forgets a parameter's worker residual: it has been sent."""
        self.worker.pop(ordinal, None)
        self._staged_worker.pop(ordinal, None)

    def section(
        self,
        section: Section,
        parts: Sequence[Part],
        used: np.ndarray | None,
        *,
        owner: int | None,
        devices: tuple[torch.device, torch.device],
        staged: bool,
        momenta: Advanced | None = None,
    ) -> Feedback:
        """Where the kernels find the residuals of a section.

        Args:
            section: The section.
            parts: The parts of its bucket.
            used: Which parts have a gradient that is not all zeros; ``None``: their device knows.
            owner: This rank's place among the owners; ``None`` keeps no owner's residuals.
            devices: Of the gradients, and of the messages.
            staged: New residuals go to a second buffer, until :meth:`commit`.
            momenta: What is encoded instead of the gradients.
        """
        mine = [parts[i] for i in section.indices]
        keep: list[Tensor] = []
        width = self.dtype.itemsize
        # An owner's elements may move to the worker's side, so they come first.
        shares = []
        if owner is not None:
            whole = section.shares.owners == 1
            for part, bounds in zip(mine, section.shares.bounds[:, owner].tolist(), strict=True):
                values = self.owner_of(part, (bounds[0], bounds[1]), whole, devices[1])
                out = _second(self._staged_owner, part.ordinal, values) if staged else values
                keep += [values, out]
                skip = width * bounds[0]
                shares.append((values.data_ptr() - skip, out.data_ptr() - skip))
        places = []
        for part in mine:
            values = self.worker_of(part, devices[0])
            out = _second(self._staged_worker, part.ordinal, values) if staged else values
            keep += [values, out]
            skip = width * part.first
            places.append((values.data_ptr() - skip, out.data_ptr() - skip))
        worker = np.array(places, dtype=np.int64).reshape(-1, 2).T
        addresses = masked = None
        if momenta is not None:
            ordinals = [part.ordinal for part in mine]
            tensors = [momenta.values.get(ordinal) for ordinal in ordinals]
            keep += [x for x in tensors if x is not None]
            addresses = np.array(
                [
                    0 if x is None else x.data_ptr() - width * part.first
                    for part, x in zip(mine, tensors, strict=True)
                ],
                dtype=np.int64,
            )
            masked = np.array([ordinal in momenta.kept for ordinal in ordinals], dtype=bool)
        owners = np.array(shares, dtype=np.int64).reshape(-1, 2).T if owner is not None else None
        return Feedback(
            worker=worker[0], worker_out=worker[1],
            owner=None if owners is None else owners[0],
            owner_out=None if owners is None else owners[1],
            dtype=str(self.dtype)[6:], used=None if used is None else used[section.indices],
            used_by_any=None, keep=keep, values=addresses, masked=masked,
        )  # fmt: skip

    def commit(self, section: Section, parts: Sequence[Part], feedback: Feedback) -> None:
        """Takes over the staged residuals of a section's parameters that were used."""
        for i, index in enumerate(section.indices):
            ordinal = parts[index].ordinal
            assert feedback.used is not None
            if feedback.used[i]:
                held = self.worker[ordinal]
                self.worker[ordinal] = self._staged_worker[ordinal]
                self._staged_worker[ordinal] = held
            if feedback.used_by_any is not None and feedback.used_by_any[i]:
                share = self.owner[ordinal]
                share.values, self._staged_owner[ordinal] = (
                    self._staged_owner[ordinal], share.values,
                )  # fmt: skip

    def replace(self, worker: dict[int, Tensor], owner: dict[int, OwnerShare]) -> None:
        """Takes others over; what was staged is forgotten."""
        self.worker, self.owner = worker, owner
        self.spare()

    def clear(self) -> None:
        """Forgets everything."""
        self.replace({}, {})

    def spare(self) -> None:
        """Writes no more into the tensors that the last :meth:`commit` put aside."""
        self._staged_worker, self._staged_owner = {}, {}

    def snapshot(self) -> tuple[dict[int, Tensor], dict[int, OwnerShare]]:
        """What :meth:`replace` takes to return to this moment, as long as residuals are staged."""
        owner = {ordinal: replace(share) for ordinal, share in self.owner.items()}
        return dict(self.worker), owner

    def drop_damaged(self) -> tuple[list[int], list[int]]:
        """Sets elements to zero that no step could have left: not finite, or out of all bounds.

        What other ranks hold too (an owner's residual of a whole parameter) stays as it is, as they
        have to go on with the same.

        Returns:
            Ordinals of parameters that had some; ordinals of those that other ranks hold too.
        """
        apart = {i: share.values for i, share in self.owner.items() if not share.whole}
        common = {i: share.values for i, share in self.owner.items() if share.whole}
        dropped = sorted({*drop_damaged(self.worker), *drop_damaged(apart)})
        return dropped, [i for i, values in common.items() if is_damaged(values)]

    def tensors(self) -> list[Tensor]:
        """All residuals."""
        return [*list(self.worker.values()), *(x.values for x in list(self.owner.values()))]

    def rescale(self, ratio: float) -> None:
        """Multiplies all residuals, as a loss scale changed by ``ratio``.

        An element that its storage cannot hold any more is dropped.
        """
        for values in self.tensors():
            values.mul_(ratio)
            values.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all residuals, staged ones too."""
        staged = [*list(self._staged_worker.values()), *list(self._staged_owner.values())]
        return sum(x.numel() * x.element_size() for x in [*self.tensors(), *staged])

    def norm(self) -> float:
        """Euclidean norm of what this rank has not sent as a worker."""
        held = list(self.worker.values())
        return math.sqrt(sum(float(x.double().square().sum()) for x in held))


def _second(staged: dict[int, Tensor], ordinal: int, like: Tensor) -> Tensor:
    if ordinal not in staged or staged[ordinal].shape != like.shape:
        staged[ordinal] = torch.zeros_like(like)
    return staged[ordinal]


def any_nonzero(flat: Tensor, parts: Sequence[Part]) -> np.ndarray:
    """Which parameters' gradients are anything but zeros, bool [parts]; NaN is not zero.

    Args:
        flat: A bucket's buffer on the CPU: float32, float16 or bfloat16.
        parts: The parameters in it.
    """
    used = np.zeros(len(parts), dtype=bool)
    # A glance at the first elements settles it nearly always. Bits, as NumPy knows no bfloat16.
    integer, sign = (torch.int32, 2**31) if flat.element_size() == 4 else (torch.int16, 2**15)
    bits = flat.view(integer).numpy()
    mask = bits.dtype.type(sign - 1)
    for i, part in enumerate(parts):
        end = part.offset + part.numel
        glance = bits[part.offset : min(part.offset + 64, end)] & mask
        used[i] = glance.any() or bool((bits[part.offset : end] & mask).any())
    return used
