"""What the DDP hook must do on two levels: the oracle of one level, on shares of nodes' sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from feedback_oracle import Kind, Oracle, clipped

from pydist.encoding.levels import bounds_in_node
from pydist.encoding.shares import Part
from pydist.reference import signs as ref


class LevelsOracle:
    """The residuals of all nodes' shares, and their steps.

    Args:
        kinds: The parameters by name.
        units: Elements of each that stay together.
        nodes: Number of nodes.
        local: Ranks of each; node k has ranks k · local ….
        dtype: Type of the gradients.
        limit: The longest that a parameter's gradient may be on a rank.
        options: Of :class:`feedback_oracle.Oracle`.
    """

    def __init__(
        self, kinds: dict[str, Kind], units: dict[str, int], nodes: int, local: int, *,
        dtype: str, limit: float = math.inf, **options: Any,
    ) -> None:  # fmt: skip
        self.dtype, self.limit, self.nodes, self.local = dtype, limit, nodes, local
        self.spans = {
            name: bounds_in_node([Part(kind.ordinal, 0, kind.numel)], [units[name]], local)[0]
            for name, kind in kinds.items()
        }
        self.across = Oracle(self._shares(kinds), nodes, dtype="float32", behind=local, **options)

    def _shares(self, kinds: dict[str, Kind]) -> dict[str, Kind]:
        return {
            f"{name}/{place}": Kind(
                kind.ordinal, int(last - first), kind.codec, kind.feedback, int(first)
            )
            for name, kind in kinds.items()
            for place, (first, last) in enumerate(self.spans[name])
        }

    def change(self, kinds: dict[str, Kind]) -> None:
        """Other codecs from now on."""
        self.across.change(self._shares(kinds))

    def step(self, gradients: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """What all ranks hold afterwards, by name, from what each rank has."""
        sums: list[dict[str, Any]] = [{} for _ in range(self.nodes)]
        for name, spans in self.spans.items():
            for node in range(self.nodes):
                mine = [
                    clipped(g[name], self.limit, self.dtype)
                    for g in gradients[node * self.local : (node + 1) * self.local]
                ]
                total = np.zeros(len(mine[0]), dtype=np.float32)
                for i, values in enumerate(mine):
                    total = total + values if i else values.astype(np.float32)
                for place, (first, last) in enumerate(spans):
                    sums[node][f"{name}/{place}"] = total[first:last]
        result, whole = self.across.step(sums, step), {}
        for name, spans in self.spans.items():
            whole[name] = np.zeros(int(spans.max(initial=0)), dtype=np.float32)
            for place, (first, last) in enumerate(spans):
                whole[name][first:last] = result[f"{name}/{place}"]
        return {name: ref.round_to(values, self.dtype) for name, values in whole.items()}

    def check(self, everyone: list[dict[str, Any]], where: str) -> None:
        """Compares what every rank keeps, as ``ranks_ddp.kept`` gives it, with its share's."""
        for rank, mine in enumerate(everyone):
            node, place = divmod(rank, self.local)
            for name, spans in self.spans.items():
                first, last = spans[place]
                for kind in ("worker", "momenta"):
                    wanted = getattr(self.across, kind)[node][f"{name}/{place}"]
                    got = mine[kind].get(name, np.zeros_like(wanted))
                    assert np.array_equal(got, wanted), f"{where}: {kind} of {name}, rank {rank}"
                if name in mine["owner"]:
                    begin, values = mine["owner"][name]
                    assert first <= begin and begin + values.size <= last, f"{where}: {name}"
                    wanted = self.across.owner[f"{name}/{place}"][begin - first :][: values.size]
                    assert np.array_equal(values, wanted), f"{where}: owner of {name}, rank {rank}"
