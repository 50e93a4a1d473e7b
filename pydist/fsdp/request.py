"""What the user asks for when a sharded model is compressed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from pydist.codecs import Codec, TopK
from pydist.encoding.choose import check_codec
from pydist.training.options import Options

if TYPE_CHECKING:
    from pydist.fsdp.state import ShardedState


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`pydist.fsdp.compress`, checked; see there.

    Attributes:
        options: How gradients travel; their codec may be ``None`` here.
        parameters: The codec of weights.
        across: The codec of averages over replicas.
        across_group: The ranks that hold the same shards.

    Raises:
        TypeError: A codec is none.
        ValueError: Arguments do not go together.
    """

    options: Options
    parameters: Codec | None
    across: Codec | None
    across_group: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        gradients = self.gradients
        if gradients is None and self.parameters is None and self.across is None:
            raise ValueError("gradients, parameters, across: at least one must be a codec")
        if (self.across is None) != (self.across_group is None):
            raise ValueError(
                "across and across_group go together: a codec, and the ranks it is for"
            )
        for codec in (self.options.codec, self.parameters, self.across):
            if codec is not None:
                check_codec(codec)
        for name, codec in (("parameters", self.parameters), ("across", self.across)):
            if isinstance(codec, TopK):
                raise ValueError(
                    f"{name}={codec}: it sends a few entries of each block alone, and nothing "
                    "keeps the others there"
                )
        asked = self.options.error_feedback
        if gradients is None and asked in (True, "worker"):
            raise ValueError(f"error_feedback={asked} needs a codec for gradients")
        check_feedback(self.options)

    @property
    def gradients(self) -> Codec | None:
        """The codec of gradients."""
        codec = self.options.codec
        return codec if isinstance(codec, Codec) else None

    def without_feedback(self, codec: Codec) -> Options:
        """The same options for another codec, which keeps no residuals."""
        return replace(self.options, codec=codec, error_feedback=False)

    def described(self) -> dict[str, object]:
        """What all ranks must have given alike, beside :meth:`Options.described`."""
        return {"weights": repr(self.parameters), "across": repr(self.across)}


def check_feedback(options: Options) -> None:
    """Raises ValueError where most of a gradient would be lost: top-k without residuals."""
    if isinstance(options.codec, TopK) and not options.error_feedback:
        raise ValueError(
            f"error_feedback={options.error_feedback}: {options.codec} sends a few entries of each "
            'block alone, and the others must be kept; use error_feedback="auto" or True'
        )


class Compressed:
    """Which models are compressed, with what was asked for and their states."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[Request, ShardedState]] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, module: nn.Module, request: Request, state: ShardedState) -> None:
        """Takes note of a model."""
        self._known[module] = request, state

    def same(self, module: nn.Module, request: Request) -> ShardedState | None:
        """The state that a model has; ``None`` where it has none.

        Raises:
            ValueError: It was asked for with other arguments.
        """
        if module not in self._known:
            return None
        before, state = self._known[module]
        if before != request:
            raise ValueError(
                "module is compressed already with other arguments; call "
                "pydist.fsdp.restore(module) first"
            )
        return state

    def forget(self, module: nn.Module) -> bool:
        """Forgets a model; whether it was known."""
        return self._known.pop(module, None) is not None
