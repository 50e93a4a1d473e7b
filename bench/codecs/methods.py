"""What `codecs.py` compares: the list of pydist's codecs, and what it asks of any method.

A new codec is a line in CODECS. It is reached through `pydist.simulate` and the coders of the
collectives alone, so it needs no blocks, no scale and no kernel of a certain name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pydist
from pydist import simulate
from pydist.codecs import Codec
from pydist.encoding.choose import all_gather_coder
from pydist.transport.coder import Worker, entropy_coder_of

Layers = list[Tensor]
"""One worker's gradient: a float32 tensor a parameter."""
Slot = SimpleNamespace
"""What a method is timed on: `x` and `out`, flat float32, and whatever it keeps beside them."""


@dataclass(frozen=True)
class Sent:
    """What became of a gradient.

    Attributes:
        values: As the receiver decodes it.
        bytes: Of the payload, without headers.
    """

    values: Layers
    bytes: int


class Method:
    """A way to send gradients.

    Attributes:
        name: For the table.
        family: Methods of a family share a colour, and a line where they differ in bits.
        scaled: Whether what is decoded has the scale of the gradient; where not, its error is taken
            at the best scale.
    """

    name: str
    family: str
    scaled = True

    def send(self, layers: Layers, history: Sequence[Layers] = ()) -> Sent:
        """One worker's gradient, encoded and decoded.

        Args:
            layers: The gradient.
            history: Its gradients of the steps before, for a method that remembers.
        """
        raise NotImplementedError

    def mean(self, workers: Sequence[Layers], history: Sequence[Sequence[Layers]] = ()) -> Layers:
        """The mean over workers as all of them get it: here of what each sent, in float32.

        Args:
            workers: One gradient a worker.
            history: Those of the steps before.
        """
        sent = [self.send(layers).values for layers in workers]
        return [torch.stack(parts).mean(0) for parts in zip(*sent, strict=True)]

    def encode(self, slot: Slot) -> None:
        """Encodes `slot.x` into something that it leaves in the slot."""
        raise NotImplementedError

    def decode(self, slot: Slot) -> None:
        """Decodes that into `slot.out`."""
        raise NotImplementedError


def name_of(codec: Any) -> str:
    """A codec with its first argument, and those of the others that have not their default."""
    first, *others = fields(codec)
    parts = [repr(getattr(codec, first.name))]
    for field in others:
        value = getattr(codec, field.name)
        if value != field.default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(codec).__name__}({', '.join(parts)})"


class CodecMethod(Method):
    """A codec of pydist; every parameter is a tensor of its own, as in a DDP bucket.

    Args:
        codec: The codec.
        family: Its class by default.
        scaled: See `Method`.
    """

    def __init__(self, codec: Codec, family: str = "", *, scaled: bool = True) -> None:
        self.codec, self.scaled = codec, scaled
        self.name, self.family = name_of(codec), family or type(codec).__name__

    def _coder(self, out: Tensor, x: Tensor) -> Any:
        coder = all_gather_coder(out.view(1, -1), x, self.codec, Worker(0, 1, step=0), seed=0)
        known = coder.scales()
        if known is not None:  # what workers tell each other before they encode
            coder.merge_scales(known[None])
        return coder

    def _pack(self, coder: Any, message: Tensor) -> list[Tensor]:
        """The message as it travels: of its own length, where a stage shortens it."""
        stage = entropy_coder_of(coder)
        return [message] if stage is None else stage.pack(message, coder.units, [(0, coder.units)])

    def send(self, layers: Layers, history: Sequence[Layers] = ()) -> Sent:
        values, size = [], 0
        for i, x in enumerate(layers):
            slot = Slot(x=x.reshape(-1), out=torch.empty(x.numel()))
            self.encode(slot)
            size += sum(part.numel() for part in slot.messages)
            values.append(simulate.all_gather([x], self.codec, seed=i)[0].view(x.shape))
        return Sent(values, size)

    def mean(self, workers: Sequence[Layers], history: Sequence[Sequence[Layers]] = ()) -> Layers:
        """As `pydist.all_reduce` gives it: what an owner has reduced is encoded once more."""
        return [
            simulate.all_reduce(list(parts), self.codec, op="mean", seed=i)
            for i, parts in enumerate(zip(*workers, strict=True))
        ]

    def encode(self, slot: Slot) -> None:
        coder = self._coder(slot.out, slot.x)
        units = coder.units
        if not hasattr(slot, "message"):
            slot.message = torch.zeros(1, coder.message_bytes(units), dtype=torch.uint8)
        coder.encode(slot.message, units, 0, units)
        slot.messages = self._pack(coder, slot.message)

    def decode(self, slot: Slot) -> None:
        coder = self._coder(slot.out, slot.x)
        stage = entropy_coder_of(coder)
        if stage is not None:
            stage.unpack(slot.messages, slot.message, coder.units, [(0, coder.units)])
        coder.decode(slot.message, coder.units, 0, coder.units)


CODECS: tuple[CodecMethod, ...] = (
    CodecMethod(pydist.Sign(None), scaled=False),
    CodecMethod(pydist.Sign("l1")),
    CodecMethod(pydist.Sign("l2")),
    *(CodecMethod(pydist.QSGD(bits)) for bits in range(2, 9)),
    *(CodecMethod(pydist.QSGD(bits, norm="l2"), "QSGD, l2") for bits in (2, 4, 8)),
    *(CodecMethod(pydist.BlockInt(bits)) for bits in range(2, 9)),
    *(CodecMethod(pydist.BlockFloat(form)) for form in ("e4m3", "e5m2")),
    *(
        CodecMethod(pydist.QSGD(bits, norm="l2", entropy="elias"), "QSGD, l2, Elias")
        for bits in (2, 4, 8)
    ),
    CodecMethod(pydist.Ternary()),
    *(CodecMethod(pydist.TopK(density)) for density in (0.001, 0.01, 0.1)),
    CodecMethod(pydist.TopK(0.01, values="bfloat16")),
    *(CodecMethod(pydist.Raw(dtype)) for dtype in ("bfloat16", "float16")),
)
