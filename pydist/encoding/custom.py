"""Codecs that are written in Python, on the wire: :class:`pydist.Codec` says what they have."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydist.codecs import Codec
from pydist.encoding.rows import OWN, REDUCED, Job, Place, RowCodec, Source
from pydist.formats import wire
from pydist.formats.philox import draws16
from pydist.formats.wire import IntArray
from pydist.kernels.checks import FLOATS
from pydist.kernels.launch import DeviceRows
from pydist.kernels.torch_tensors import tensor_at

_NAMES = {number: name for name, number in FLOATS.items()}


@dataclass(frozen=True)
class Draws:
    """Random numbers of the elements of one call of ``encode``.

    Attributes:
        seed: Seed of the collective.
        rank: The rank that encodes; 0 where an owner encodes what it has reduced.
        phase: 0 for a rank's own contribution, 1 for what an owner has reduced, 2 for a weight.
        step: Step of the collective.
        ordinal: The parameter's place in ``named_parameters()``.
        first: Index of the first element in its parameter.
        n: Elements.
        device: Where the data is.
    """

    seed: int
    rank: int
    phase: int
    step: int
    ordinal: int
    first: int
    n: int
    device: torch.device

    def uniform(self) -> Tensor:
        """float32 [n] in [0, 1): multiples of 2**-16, a function of all attributes."""
        key = self.rank << 2 | self.phase
        words = draws16(self.seed, key, self.step % 2**32, self.ordinal, self.first, self.n)
        return torch.from_numpy(words.astype(np.float32) / 65536).to(self.device)


def check_custom(codec: Codec) -> None:
    """Raises unless the sizes of a codec written in Python fit together.

    Raises:
        TypeError: It is not hashable, or a size is not an integer.
        ValueError: A size is out of range, or a short block is longer than a whole one.
    """
    name = type(codec).__name__
    for method in ("decode", "payload_bytes"):
        if getattr(type(codec), method) is getattr(Codec, method):
            raise TypeError(f"codec {name} has encode and no {method}: see pydist.Codec")
    if type(codec).__repr__ is object.__repr__:
        raise TypeError(
            f"codec {name} must have a repr that is equal on all ranks, as a dataclass has"
        )
    try:
        hash(codec)
    except TypeError as error:
        raise TypeError(f"codec {name} must be hashable, such as a frozen dataclass") from error
    if wire.as_int(f"{name}.block", codec.block) < 1:
        raise ValueError(f"{name}.block must be at least 1, got {codec.block}")
    whole = wire.as_int(f"{name}.payload_bytes({codec.block})", codec.payload_bytes(codec.block))
    for n in {0, 1, codec.block - 1, codec.block, 3 * codec.block, 3 * codec.block + 1}:
        size, most = codec.payload_bytes(n), -(-n // codec.block) * whole
        if not 0 <= wire.as_int(f"{name}.payload_bytes({n})", size) <= most:
            raise ValueError(
                f"{name}.payload_bytes({n}) must be from 0 to {most} (blocks of {whole} bytes), "
                f"got {size}"
            )


class CustomRows(RowCodec):
    """A codec written in Python; a unit is a block.

    Args:
        codec: The codec.
        numel: Elements of a dense tensor, which travels as short as it is; ``None`` for whole
            blocks.

    Raises:
        TypeError, ValueError: As of :func:`check_custom`.
    """

    number = wire.CODECS["custom"]
    bits = 0
    on_host = True

    def __init__(self, codec: Codec, numel: int | None = None) -> None:
        check_custom(codec)
        self.codec, self.unit = codec, codec.block
        self.unit_bytes = self.reduced_unit_bytes = _words(codec.payload_bytes(codec.block))
        self._bytes = None if numel is None else _words(codec.payload_bytes(numel))
        self.agreed = {"block": self.unit, "bytes per block": self.unit_bytes}
        self._draws = "draws" in inspect.signature(codec.encode).parameters

    def columns(self, units: int) -> tuple[int, ...]:
        """Bytes of the payloads."""
        size = units * self.unit_bytes
        return (size if self._bytes is None else min(size, self._bytes),)

    # ----------------------------------------------------------------- the codec's methods

    def _payload(self, x: Tensor, draws: Draws) -> Tensor:
        """What the codec makes of elements, checked."""
        more = {"draws": draws} if self._draws else {}
        payload = _tensor(self.codec.encode(x, **more))
        size, most = self.codec.payload_bytes(len(x)), -(-len(x) // self.unit) * self.unit_bytes
        if size > most:
            raise ValueError(
                f"{self.codec}.payload_bytes({len(x)}) must be at most {most}, got {size}"
            )
        if payload.dtype != torch.uint8 or payload.shape != (size,):
            raise ValueError(
                f"{self.codec}.encode must return uint8 [{size}] of {len(x)} elements, got "
                f"{payload.dtype} {list(payload.shape)}"
            )
        return payload.to(x.device).contiguous()

    def _values(self, payload: Tensor, n: int) -> Tensor:
        """What the codec makes of a payload, checked."""
        values = _tensor(self.codec.decode(payload, n))
        if values.dtype != torch.float32 or values.shape != (n,):
            raise ValueError(
                f"{self.codec}.decode must return float32 [{n}], got {values.dtype} "
                f"{list(values.shape)}"
            )
        return values.to(payload.device)

    def _sum(self, source: Source, n: int, word: int, divisor: int, message: int = 0) -> Tensor:
        """The ranks' values of one row, added in rank order, over ``divisor``."""
        begin, size = word * self.unit_bytes, self.codec.payload_bytes(n)
        total = torch.zeros(n, dtype=torch.float32, device=source.near.device)
        sent = source.rows() if source.ranks > 1 else [source.bytes(message)]
        for one in sent:
            total += self._values(one[begin : begin + size].clone(), n)  # aligned
        return total / divisor if divisor != 1 else total

    # ----------------------------------------------------------------- rows

    def encode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray | DeviceRows,
        dtype: int,
        place: Place,
        flags: Tensor,
        *,
        state: int | None = None,
        phase: int = OWN,
    ) -> None:
        """Row after row, with residuals where there are some."""
        assert not isinstance(rows, DeviceRows)
        for address, kept_at, new_at, n, word, ordinal, first, _, message in _filled(rows):
            values = tensor_at(address, n, _NAMES[dtype], x.device).float()
            at = word, message
            if state is None or not kept_at:
                self._encode_row(job, values, at, ordinal, first, place, flags, phase)
                continue
            kept = tensor_at(kept_at, n, _NAMES[state], x.device)
            wanted = values + kept.float()
            payload = self._encode_row(job, wanted, at, ordinal, first, place, flags, phase)
            lost = wanted - self._values(payload, n)
            new = tensor_at(new_at, n, _NAMES[state], x.device)
            new.copy_(torch.where(lost.isfinite(), lost, kept.float()))

    def _encode_row(
        self,
        job: Job,
        values: Tensor,
        at: tuple[int, int],
        ordinal: int,
        first: int,
        place: Place,
        flags: Tensor,
        phase: int,
    ) -> Tensor:
        """Writes a row's payload from a unit of a message on; returns it."""
        rank = 0 if phase == REDUCED else job.worker.draws
        draws = Draws(
            job.seed, rank, phase, job.worker.step, ordinal, first, len(values), values.device
        )
        payload = self._payload(values, draws)
        begin = at[0] * self.unit_bytes
        room = place.bytes(at[1])[begin : begin + -(-len(values) // self.unit) * self.unit_bytes]
        room[: len(payload)], room[len(payload) :] = payload, 0
        flags |= (~values.isfinite()).any().to(torch.int32) * wire.FLAG_NON_FINITE
        return payload

    def reduce(self, job: Job, rows: IntArray, source: Source, place: Place, flags: Tensor) -> None:
        """Decodes, sums in rank order, divides for a mean, encodes again."""
        for _, _, _, n, word, ordinal, first, _, message in _filled(rows):
            total = self._sum(source, n, word, job.divisor)
            at = word, message
            self._encode_row(job, total, at, ordinal, first, place, flags, REDUCED)

    def decode(
        self,
        job: Job,
        x: Tensor,
        rows: IntArray,
        dtype: int,
        source: Source,
        divisor: int,
        flags: Tensor,
    ) -> None:
        """Decodes and sums in rank order."""
        for address, _, _, n, word, _, _, _, message in _filled(rows):
            out = tensor_at(address, n, _NAMES[dtype], x.device)
            out.copy_(self._sum(source, n, word, divisor, message))


def _filled(rows: IntArray) -> list[list[int]]:
    """Rows that have elements."""
    filled: list[list[int]] = rows[rows[:, wire.N] > 0].tolist()
    return filled


def _words(size: int) -> int:
    """Bytes of whole words of a message."""
    return -(-size // wire.WORD_BYTES) * wire.WORD_BYTES


def _tensor(x: Any) -> Tensor:
    """A tensor of what a codec has returned."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
