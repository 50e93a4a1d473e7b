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
from pydist.ddp.schedule import Codecs, Schedule, described
from pydist.feedback import contracts, forbids
from pydist.road import ALGORITHMS

Exclude = Callable[[str, Tensor], bool] | Iterable[str]
FEEDBACK = ("auto", True, False, "worker")
WARM_UP, LOCAL = -1, -2  # stages in which nothing is compressed
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

    codec: Codecs | Schedule
    error_feedback: str | bool
    warmup_steps: int
    min_numel: int
    exclude: Exclude | None
    seed: int
    op: str
    algorithm: str
    residual_dtype: torch.dtype
    exact_skip: bool
    momentum: float = 0.0
    clip_norm: float | None = None
    local_after: int | None = None
    in_subgroup: bool = False
    error_every: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude must be patterns or a predicate, got {self.exclude!r}")
        if self.exclude is not None and not callable(self.exclude):
            object.__setattr__(self, "exclude", tuple(self.exclude))
        checks.check_seed(self.seed)
        for name in ("warmup_steps", "min_numel", "error_every"):
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
        self._check_local()
        for codec in self.codecs():
            if codec is None:
                continue
            check_codec(codec)
            check_op(self.op, codec, OPS)
            check_bucket_codec(codec)
            reason = forbids(codec)
            if self.error_feedback in (True, "worker") and reason:
                raise ValueError(f"error_feedback={self.error_feedback}: {reason}")

    def _check_local(self) -> None:
        """Checks what happens on a rank alone."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be positive and finite, got {self.clip_norm}")
        if self.local_after is None:
            if self.in_subgroup:
                raise ValueError("subgroup is used after local_after steps, and that is None")
            return
        if wire.as_int("local_after", self.local_after) < 0:
            raise ValueError(f"local_after must not be negative, got {self.local_after}")
        if self.op != "mean":
            raise ValueError(f"local_after needs op='mean', got {self.op!r}")
        if self.exact_skip:
            raise ValueError("local_after excludes exact_skip: ranks would count other steps")

    def codecs(self) -> list[Codec | None]:
        """All codecs that were given."""
        result: list[Codec | None] = []
        for codec in self._stages():
            result += codec.values() if isinstance(codec, Mapping) else [codec]
        return result

    def _stages(self) -> list[Codecs]:
        if isinstance(self.codec, Schedule):
            return [codec for _, codec in self.codec.stages]
        return [self.codec]

    def stage(self, step: int) -> int:
        """What a step compresses with: the place in a schedule, ``WARM_UP`` or ``LOCAL``."""
        if self.local_after is not None and step >= self.local_after:
            return LOCAL
        if step < self.warmup_steps:
            return WARM_UP
        return self.codec.stage(step) if isinstance(self.codec, Schedule) else 0

    @property
    def owner_feedback(self) -> bool:
        """Whether owners keep residuals too."""
        return self.error_feedback != "worker"

    @property
    def needs_names(self) -> bool:
        """Whether parameters are chosen by name."""
        by_pattern = any(isinstance(codec, Mapping) for codec in self._stages())
        return by_pattern or self.exclude is not None

    def described(self) -> dict[str, Any]:
        """What all ranks must have given alike (a predicate is seen by what it excludes)."""
        codec = self.codec
        return {
            "codec": codec.described() if isinstance(codec, Schedule) else described(codec),
            "error_feedback": self.error_feedback,
            "warmup_steps": self.warmup_steps,
            "min_numel": self.min_numel,
            "exclude": "predicate" if callable(self.exclude) else self.exclude,
            "seed": self.seed,
            "op": self.op,
            "algorithm": self.algorithm,
            "residual_dtype": str(self.residual_dtype),
            "exact_skip": self.exact_skip,
            "momentum": self.momentum,
            "clip_norm": self.clip_norm,
            "local_after": self.local_after,
            "subgroup": self.in_subgroup,
        }

    # ----------------------------------------------------------------- one parameter

    def _excluded(self, name: str, param: Tensor) -> str:
        if callable(self.exclude):
            return "excluded by predicate" if self.exclude(name, param) else ""
        for pattern in self.exclude or ():
            if fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        return ""

    def _codec_of(self, name: str, stage: int) -> Codec | None:
        codecs = self._stages()[stage]
        if not isinstance(codecs, Mapping):
            return codecs
        for pattern, codec in codecs.items():
            if fnmatchcase(name, pattern):
                return codec
        return None

    def ever_keeps(self, name: str, param: Tensor) -> bool:
        """Whether a parameter keeps residuals in any stage."""
        stages = range(len(self._stages()))
        return any(self.choose(name, param, param.dtype, stage).feedback for stage in stages)

    def choose(self, name: str, param: Tensor, dtype: torch.dtype, stage: int = 0) -> Choice:
        """How a parameter travels whose gradient is of ``dtype``, in a stage of :meth:`stage`."""
        if stage < 0:
            return Choice(None, reason="warm-up" if stage == WARM_UP else "local step")
        numel = param.numel()
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Choice(None, reason=f"codecs do not take {dtype}")
        if reason := self._excluded(name, param):
            return Choice(None, reason=reason)
        codec = self._codec_of(name, stage)
        if codec is None:
            return Choice(None, reason="no codec for its name")
        if numel < self.min_numel:
            return Choice(None, reason=f"fewer than {self.min_numel} elements")
        # A short last block is filled up, so a block should be small against its parameter.
        if (size := bytes_in_bucket(codec, numel)) and size >= numel * dtype.itemsize:
            return Choice(None, reason="would not be smaller")
        keeps = contracts(codec) if self.error_feedback == "auto" else bool(self.error_feedback)
        return Choice(codec, feedback=keeps and not isinstance(codec, Raw))
