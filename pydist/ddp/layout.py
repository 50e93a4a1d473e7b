"""Parameters and their places; how the parameters of a bucket travel together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from pydist.codecs.bucket_coder import BucketPlan
from pydist.codecs.shares import Part
from pydist.ddp.options import Choice, Options, plain_name
from pydist.road import choose_algorithm


class Parameters:
    """The parameters of a model by place and by name.

    Args:
        named: ``model.named_parameters()``; ``None`` numbers them as they come.

    Raises:
        ValueError: Two have one name.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]] | None) -> None:
        self.named = named is not None
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self._places: dict[Tensor, int] = {}
        for name, param in named or ():
            self._add(plain_name(name), param)

    def _add(self, name: str, param: Tensor) -> int:
        if name in self.names:
            raise ValueError(f"named_parameters: two parameters are called {name!r}")
        self._places[param] = len(self.names)
        self.names.append(name)
        self.tensors.append(param)
        return self._places[param]

    def ordinal(self, param: Tensor) -> int:
        """A parameter's place.

        Raises:
            ValueError: There are names, and none is the parameter's.
        """
        place = self._places.get(param)
        if place is not None:
            return place
        if self.named:
            raise ValueError("a bucket holds a parameter that named_parameters did not name")
        return self._add(f"parameter {len(self.names)}", param)

    def ordinal_of(self, name: str) -> int | None:
        """The place of a name; ``None`` where there is none such."""
        return self.names.index(name) if name in self.names else None

    def described(self) -> dict[str, Any]:
        """Name, dtype and shape of all, where they have names: equal on all ranks."""
        if not self.named:
            return {}
        fields: dict[str, Any] = {"parameters": len(self.names)}
        for i, (name, param) in enumerate(zip(self.names, self.tensors, strict=True)):
            fields[f"parameter {i}"] = [name, str(param.dtype), list(param.shape)]
        return fields

    def trained(self) -> Iterable[tuple[int, str, Tensor]]:
        """Place and name of every parameter that gets gradients, and itself.

        Raises:
            ValueError: The parameters have no names.
        """
        if not self.named:
            raise ValueError("named_parameters was not given: parameters have no names")
        for ordinal, (name, param) in enumerate(zip(self.names, self.tensors, strict=True)):
            if param.requires_grad:
                yield ordinal, name, param

    def with_residuals(self, options: Options) -> Iterable[tuple[int, str]]:
        """Place and name of every parameter that keeps residuals in some step.

        Raises:
            ValueError: The parameters have no names.
        """
        for ordinal, name, param in self.trained():
            if options.ever_keeps(name, param):
                yield ordinal, name


@dataclass
class Layout:
    """A bucket as it was laid out once; used again as long as it does not change.

    Attributes:
        choices: How each parameter travels.
        plan: How they share messages.
        algorithm: The way the bucket takes.
        digest: Checksum of ``fields``.
        fields: What all ranks must agree on at the first call.
        agreed: They have.
    """

    choices: list[Choice]
    plan: BucketPlan
    algorithm: str
    digest: int
    fields: dict[str, Any]
    agreed: bool = False


class Layouts:
    """The layouts of a model's buckets.

    Args:
        options: What the user asked for.
        parameters: The model's.
        ranks: Ranks of the group.
    """

    def __init__(self, options: Options, parameters: Parameters, ranks: int) -> None:
        self.options, self.parameters, self.ranks = options, parameters, ranks
        self._known: dict[tuple[Any, ...], Layout] = {}

    def of(self, bucket: GradBucket, flat: Tensor, stage: int) -> Layout:
        """How a bucket's parameters travel.

        Args:
            bucket: DDP's bucket.
            flat: Its buffer: dense, real, one-dimensional.
            stage: Of :meth:`pydist.ddp.options.Options.stage`.

        Raises:
            ValueError: A parameter has no name, or the bucket another length than its parameters.
        """
        params = bucket.parameters()
        ordinals = [self.parameters.ordinal(param) for param in params]
        key = (bucket.index(), bucket.buffer().dtype, flat.numel(), stage, *ordinals)
        layout = self._known.get(key)
        if layout is None:
            layout = self._lay_out(bucket, flat, ordinals, stage)
            # Buckets are rebuilt once or twice and stages pass; what was before is not needed.
            for old in [old for old in self._known if old[0] == key[0]]:
                del self._known[old]
            self._known[key] = layout
        return layout

    def agree_again(self) -> None:
        """The next call of every bucket compares the whole layout again."""
        for layout in self._known.values():
            layout.agreed = False

    def _lay_out(self, bucket: GradBucket, flat: Tensor, ordinals: list[int], stage: int) -> Layout:
        params, dtype = bucket.parameters(), flat.dtype
        names = [self.parameters.names[i] for i in ordinals]
        # A complex number lies there as two.
        sizes = np.array(
            [param.numel() * (2 if param.is_complex() else 1) for param in params], dtype=np.int64
        )
        if int(sizes.sum()) != flat.numel():
            raise ValueError(f"a bucket of {flat.numel()} elements holds {int(sizes.sum())}")
        parts = [
            Part(ordinal, int(end - size), int(size))
            for ordinal, end, size in zip(ordinals, np.cumsum(sizes), sizes, strict=True)
        ]
        choices = [
            Choice(None, reason="sparse gradient")
            if stage >= 0 and bucket.buffer().is_sparse
            else self.options.choose(
                name, param, param.dtype if param.is_complex() else dtype, stage
            )
            for name, param in zip(names, params, strict=True)
        ]
        plan, algorithm = self._plan(parts, choices, flat)
        fields: dict[str, Any] = {
            f"parameter {part.ordinal}": [
                name, str(dtype), list(param.shape), repr(choice.codec), choice.feedback,
            ]
            for part, name, param, choice in zip(parts, names, params, choices, strict=True)
        }  # fmt: skip
        digest = zlib.crc32(repr([str(dtype), algorithm, *fields.items()]).encode())
        return Layout(choices, plan, algorithm, digest, fields)

    def _plan(
        self, parts: list[Part], choices: list[Choice], flat: Tensor
    ) -> tuple[BucketPlan, str]:
        codecs = [choice.codec for choice in choices]
        keeps = [choice.feedback for choice in choices]
        plan = BucketPlan(parts, codecs, keeps, flat.dtype, self.ranks, self.ranks)
        algorithm = "all_gather"
        if self.ranks > 1:
            algorithm = choose_algorithm(self.options.algorithm, plan, self.ranks)
        if algorithm == "all_gather":
            plan = BucketPlan(parts, codecs, keeps, flat.dtype, self.ranks, 1)
        return plan, algorithm
