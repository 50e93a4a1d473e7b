"""What the user asks for, and what it means for one parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from pydist.codecs import Codec, Raw
from pydist.encoding.choose import bytes_in_bucket, check_codec, check_op, unit_of
from pydist.formats import wire
from pydist.kernels import checks
from pydist.training.residuals import contracts, forbids
from pydist.training.schedule import Codecs, Schedule, described
from pydist.transport.exchange import ALGORITHMS

Exclude = Callable[[str, Tensor], bool] | Iterable[str]
ErrorFeedback = bool | Literal["auto", "worker"]
Op = Literal["mean", "sum"]
Algorithm = Literal["auto", "two_phase", "all_gather"]
FEEDBACK = ("auto", True, False, "worker")
WARM_UP, LOCAL = -1, -2  # stages in which nothing is compressed
OPS = ("mean", "sum")


@dataclass(frozen=True)
class Choice:
    """How one parameter travels.

    Attributes:
        codec: Its codec; ``None``: raw.
        feedback: Keep residuals.
        reason: Why it travels raw; empty where it does not.
        too_small: It has too few elements for its codec.
    """

    codec: Codec | None
    feedback: bool = False
    reason: str = ""
    too_small: bool = False


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
    replica_check_every: int = 0
    levels: str | None = None
    inner: Codec | None = None

    def __post_init__(self) -> None:
        self._check_types()
        checks.check_seed(self.seed)
        for name in ("warmup_steps", "min_numel", "error_every", "replica_check_every"):
            if wire.as_int(name, getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        known: list[tuple[str, Any, Sequence[Any]]] = [
            ("error_feedback", self.error_feedback, FEEDBACK),
            ("op", self.op, OPS),
            ("algorithm", self.algorithm, ALGORITHMS),
            ("residual_dtype", self.residual_dtype, (torch.float32, torch.bfloat16)),
        ]
        for name, value, values in known:
            # By type too: 1 and True are equal.
            if not any(type(value) is type(one) and value == one for one in values):
                raise ValueError(f"{name} must be one of {list(values)}, got {value!r}")
        self._check_local()
        self._check_levels()
        for pattern in self._patterns():
            if not isinstance(pattern, str):
                raise TypeError(f"codec must map patterns (str) to codecs, got {pattern!r}")
        for codec in self.codecs():
            if codec is None:
                continue
            check_codec(codec)
            check_op(self.op, codec, OPS)
            reason = forbids(codec)
            if self.error_feedback in (True, "worker") and reason:
                raise ValueError(f"error_feedback={self.error_feedback}: {reason}")

    def _check_types(self) -> None:
        """Checks types, and makes a tuple of patterns."""
        for name in ("momentum", "clip_norm"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number and not (value is None and name == "clip_norm"):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.exact_skip, bool):
            raise TypeError(f"exact_skip must be True or False, got {self.exact_skip!r}")
        if self.exclude is None or callable(self.exclude):
            return
        if isinstance(self.exclude, str) or not isinstance(self.exclude, Iterable):
            raise TypeError(f"exclude must be patterns or a predicate, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for pattern in self.exclude:
            if not isinstance(pattern, str):
                raise TypeError(f"exclude must hold patterns (str), got {pattern!r}")

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

    def _check_levels(self) -> None:
        """Checks what belongs to two levels."""
        if self.inner is not None:
            check_codec(self.inner)
            check_op("sum", self.inner, OPS)
            if self.levels is None:
                raise ValueError(f"inner={self.inner} needs levels='auto', or a mesh")
        if self.levels is not None and self.momentum and self.local_after is not None:
            raise ValueError(
                f"momentum={self.momentum} and local_after={self.local_after} exclude levels: "
                "momenta belong to nodes there, and local steps to ranks"
            )

    def codecs(self) -> list[Codec | None]:
        """All codecs that were given, but for that inside a node."""
        result: list[Codec | None] = []
        for codec in self._stages():
            result += codec.values() if isinstance(codec, Mapping) else [codec]
        return result

    def _stages(self) -> list[Codecs]:
        if isinstance(self.codec, Schedule):
            return [codec for _, codec in self.codec.stages]
        return [self.codec]

    def _patterns(self) -> list[str]:
        """The patterns of names that choose codecs."""
        return [x for codec in self._stages() if isinstance(codec, Mapping) for x in codec]

    def stage(self, step: int) -> int:
        """What a step compresses with: the place in a schedule, ``WARM_UP`` or ``LOCAL``."""
        if self.local_after is not None and step >= self.local_after:
            return LOCAL
        if step < self.warmup_steps:
            return WARM_UP
        return self.codec.stage(step) if isinstance(self.codec, Schedule) else 0

    @property
    def last_stage(self) -> int:
        """The place in a schedule where it ends."""
        return len(self._stages()) - 1

    @property
    def owner_feedback(self) -> bool:
        """Whether owners keep residuals too."""
        return self.error_feedback != "worker"

    @property
    def needs_names(self) -> bool:
        """Whether parameters are chosen by name."""
        by_pattern = any(isinstance(codec, Mapping) for codec in self._stages())
        return by_pattern or self.exclude is not None

    @property
    def counts_steps(self) -> bool:
        """Whether it matters which backwards belong to one step."""
        return bool(self.momentum) or self.clip_norm is not None or self.exact_skip

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that no parameter's name matches."""
        patterns = self._patterns()
        patterns += () if self.exclude is None or callable(self.exclude) else self.exclude
        known = list(names)
        return [
            pattern
            for pattern in dict.fromkeys(patterns)
            if not any(fnmatchcase(name, pattern) for name in known)
        ]

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
            "replica_check_every": self.replica_check_every,
            "levels": self.levels,
            "inner": None if self.inner is None else repr(self.inner),
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
            return Choice(None, reason=f"fewer than {self.min_numel} elements", too_small=True)
        # A short last block is filled up, so a block should be small against its parameter.
        if (size := bytes_in_bucket(codec, numel)) and size >= numel * dtype.itemsize:
            return Choice(None, reason="would not be smaller", too_small=True)
        keeps = contracts(codec) if self.error_feedback == "auto" else bool(self.error_feedback)
        return Choice(codec, feedback=keeps and not isinstance(codec, Raw))

    def unit(self, name: str, param: Tensor) -> int:
        """Elements of a parameter that stay together, whatever codec it has in whatever stage."""
        choices = [
            self.choose(name, param, torch.float32, stage) for stage in range(self.last_stage + 1)
        ]
        return math.lcm(*(unit_of(choice.codec or Raw()) for choice in choices))

    def uncompressed(self, parameters: Iterable[tuple[str, Tensor]]) -> str | None:
        """What to change where most of what codecs were given for is too small for them.

        Args:
            parameters: Those that get gradients, with their names.

        Returns:
            The warning; ``None`` where codecs take at least half.
        """
        smallest, stage = replace(self, min_numel=0), self.last_stage
        counts = {"coded": 0, "small": 0}
        would: list[int] = []
        number = 0
        for name, param in parameters:
            choice = self.choose(name, param, param.dtype, stage)
            if choice.codec is not None:
                counts["coded"] += 0 if isinstance(choice.codec, Raw) else param.numel()
            elif choice.too_small:
                freed = smallest.choose(name, param, param.dtype, stage).codec
                if not isinstance(freed, Raw):
                    counts["small"] += param.numel()
                    number += 1
                    would += [param.numel()] if freed is not None else []
        if counts["small"] <= counts["coded"]:
            return None
        change = "take a codec with a smaller block"
        if would:
            change = f"with min_numel={min(would)} {sum(would):,} of these elements are compressed"
        return (
            f"{counts['small']:,} elements in {number} parameters travel uncompressed, "
            f"{counts['coded']:,} compressed: they are smaller than min_numel={self.min_numel}, or "
            f"than a block of their codec; {change}"
        )
