"""What the user asks for, and what it means for one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pydist import checks, wire
from pydist.codecs.bucket_coder import bytes_in_bucket, check_bucket_codec
from pydist.codecs.coders import Codec, check_codec, check_op
from pydist.codecs.raw import Raw
from pydist.feedback import contracts, forbids
from pydist.road import ALGORITHMS

Exclude = Callable[[str, Tensor], bool] | Iterable[str]
FEEDBACK = ("auto", True, False, "worker")
OPS = ("mean", "sum")

# What torch.nn puts into names without changing what a parameter is.
_WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, torch.compile and checkpoint wrappers."""
    if name.startswith("module."):
        name = name.removeprefix("module.")
    for wrapper in _WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    return name


@dataclass(frozen=True)
class Choice:
    """How one parameter travels.

    Attributes:
        codec: Its codec; ``None``: raw.
        feedback: Keep residuals.
        reason: Why it travels raw; empty where it does not.
    """

    codec: Codec | None
    feedback: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Options:
    """The arguments of a :class:`pydist.ddp.CompressionState`, checked; see there.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or error feedback was forced where it diverges.
    """

    codec: Codec | Mapping[str, Codec | None]
    error_feedback: str | bool
    warmup_steps: int
    min_numel: int
    exclude: Exclude | None
    seed: int
    op: str
    algorithm: str
    residual_dtype: torch.dtype
    exact_skip: bool

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude must be patterns or a predicate, got {self.exclude!r}")
        if self.exclude is not None and not callable(self.exclude):
            object.__setattr__(self, "exclude", tuple(self.exclude))
        checks.check_seed(self.seed)
        for name in ("warmup_steps", "min_numel"):
            if wire.as_int(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        known: list[tuple[str, Any, Sequence[Any]]] = [
            ("error_feedback", self.error_feedback, FEEDBACK),
            ("op", self.op, OPS),
            ("algorithm", self.algorithm, ALGORITHMS),
            ("residual_dtype", self.residual_dtype, (torch.float32, torch.bfloat16)),
        ]
        for name, value, values in known:
            if value not in values:
                raise ValueError(f"{name} must be one of {list(values)}, got {value!r}")
        for codec in self.codecs():
            if codec is None:
                continue
            check_codec(codec)
            check_op(self.op, codec, OPS)
            check_bucket_codec(codec)
            reason = forbids(codec)
            if self.error_feedback in (True, "worker") and reason:
                raise ValueError(f"error_feedback={self.error_feedback}: {reason}")

    def codecs(self) -> list[Codec | None]:
        """All codecs that were given."""
        return list(self.codec.values()) if isinstance(self.codec, Mapping) else [self.codec]

    @property
    def owner_feedback(self) -> bool:
        """Whether owners keep residuals too."""
        return self.error_feedback != "worker"

    @property
    def needs_names(self) -> bool:
        """Whether parameters are chosen by name."""
        return isinstance(self.codec, Mapping) or self.exclude is not None

    def described(self) -> dict[str, Any]:
        """What all ranks must have given alike (a predicate is seen by what it excludes)."""
        codecs = self.codec if isinstance(self.codec, Mapping) else {"*": self.codec}
        return {
            "codec": {pattern: repr(codec) for pattern, codec in codecs.items()},
            "error_feedback": self.error_feedback,
            "warmup_steps": self.warmup_steps,
            "min_numel": self.min_numel,
            "exclude": "predicate" if callable(self.exclude) else self.exclude,
            "seed": self.seed,
            "op": self.op,
            "algorithm": self.algorithm,
            "residual_dtype": str(self.residual_dtype),
            "exact_skip": self.exact_skip,
        }

    # ----------------------------------------------------------------- one parameter

    def _excluded(self, name: str, param: Tensor) -> str:
        if callable(self.exclude):
            return "excluded by predicate" if self.exclude(name, param) else ""
        for pattern in self.exclude or ():
            if fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        return ""

    def _codec_of(self, name: str) -> Codec | None:
        if not isinstance(self.codec, Mapping):
            return self.codec
        for pattern, codec in self.codec.items():
            if fnmatchcase(name, pattern):
                return codec
        return None

    def choose(self, name: str, param: Tensor, dtype: torch.dtype) -> Choice:
        """How a parameter travels whose gradient is of ``dtype``."""
        numel = param.numel()
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Choice(None, reason=f"codecs do not take {dtype}")
        if reason := self._excluded(name, param):
            return Choice(None, reason=reason)
        codec = self._codec_of(name)
        if codec is None:
            return Choice(None, reason="no codec for its name")
        if numel < self.min_numel:
            return Choice(None, reason=f"fewer than {self.min_numel} elements")
        # A short last block is filled up, so a block should be small against its parameter.
        if (size := bytes_in_bucket(codec, numel)) and size >= numel * dtype.itemsize:
            return Choice(None, reason="would not be smaller")
        keeps = contracts(codec) if self.error_feedback == "auto" else bool(self.error_feedback)
        return Choice(codec, feedback=keeps and not isinstance(codec, Raw))
