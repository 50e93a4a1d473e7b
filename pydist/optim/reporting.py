"""What optimizers say of themselves: statistics, lines for logs, advice."""

from __future__ import annotations

import logging

from torch import Tensor

from pydist.optim.saving import StatefulOptimizer
from pydist.training.advice import Advice
from pydist.training.dtensor import local_of
from pydist.training.stats import Counters, ScalarWriter, write_scalars

logger = logging.getLogger("pydist.optim")


class ReportingOptimizer(StatefulOptimizer):
    """Counts what is sent, and tells."""

    _counters: Counters

    @property
    def _step(self) -> int:
        return int(self.param_groups[0]["step"])

    def stats(self) -> dict[str, float]:
        """What was sent so far and what it cost, as flat numbers; see ``docs/optimizers.md``.

        It never communicates and may be called at any time, from any thread.
        """
        return {
            "step": self._step,
            "skipped_steps": self.skipped_steps,
            "world_size": self.rank_and_world[1],
            **self._counters.summary(),
            **self._kept_memory(),
        }

    def _kept_memory(self) -> dict[str, float]:
        tensors = [
            local_of(x)
            for entry in list(self.state.values())
            for x in list(entry.values())
            if isinstance(x, Tensor)
        ]
        return {"state_bytes": sum(x.numel() * x.element_size() for x in tensors)}

    def advice(self) -> Advice:
        """Whether DDP's ``bucket_cap_mb`` suits the messages, where buckets vote (``attach()``)."""
        return Advice("keep", 0.0, 1, self._counters.last_bytes, "a step is one message")

    def log(self, writer: ScalarWriter, step: int | None = None, prefix: str = "pydist") -> None:
        """Writes ``stats()`` to a TensorBoard ``SummaryWriter``, or what has its ``add_scalar``.

        Args:
            writer: Where to.
            step: The step to write them at; default this optimizer's.
            prefix: Stands before every name.
        """
        write_scalars(writer, self.stats(), self._step if step is None else step, prefix)

    def log_summary(self) -> None:
        """Writes one line to the logger ``pydist.optim``, level INFO."""
        advice = self.advice()
        more = f"; {advice}" if advice.verdict in ("larger", "smaller") else ""
        logger.info(f"{self._counters.line()}, {self.skipped_steps} steps skipped{more}")
