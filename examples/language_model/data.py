"""Real text for the language-model example, without a download.

The text is the reference documentation that ships inside CPython: the help topics of the
standard module `pydoc_data.topics`, about 0.45 MB. It differs a little between Python versions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_text() -> Tensor:
    """Read the help topics of the running Python, concatenated in sorted key order.

    Returns:
        The UTF-8 bytes of the text, a uint8 tensor of shape `(bytes,)`.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


def split(text: Tensor, validation_share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Cut a text into a training part and, after it, a validation part.

    Args:
        text: The whole text, shape `(bytes,)`.
        validation_share: Share of the text, at its end, kept for validation.

    Returns:
        The training text and the validation text, one-dimensional and without overlap.
    """
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"validation_share must lie between 0 and 1, got {validation_share}")
    cut = round(len(text) * (1.0 - validation_share))
    return text[:cut], text[cut:]


class Batches:
    """An endless, deterministic stream of one worker's training batches.

    All workers draw from the whole text. At each step one generator, seeded alike on every
    worker, picks the starting places of the global batch, and a worker keeps its own share of
    them: the global batch depends on `seed` and on `world_size * batch_size`, and not on how
    many workers it is divided among.

    Args:
        text: Training text, a uint8 tensor of shape `(bytes,)`.
        rank: Index of this worker, from 0.
        world_size: Number of workers.
        batch_size: Sequences in a batch of one worker.
        context: Input bytes in a sequence.
        seed: Seed of the stream; the same on all workers.
    """

    def __init__(
        self,
        text: Tensor,
        rank: int,
        world_size: int,
        batch_size: int,
        context: int,
        seed: int,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(text) <= context:
            raise ValueError(f"text has {len(text)} bytes; context {context} needs more")
        self._windows = text.unfold(0, context + 1, 1)  # a view, (windows, context + 1)
        self._mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self._total = world_size * batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Batches:
        """Return the stream itself."""
        return self

    def __next__(self) -> Tensor:
        """Draw the next batch.

        Returns:
            Byte values, an int64 tensor of shape `(batch_size, context + 1)`: the inputs are
            all columns but the last, the targets all but the first.
        """
        starts = torch.randint(len(self._windows), (self._total,), generator=self._generator)
        return self._windows[starts[self._mine]].long()


def validation_set(text: Tensor, context: int, sequences: int | None = None) -> Tensor:
    """Cut the validation text into fixed sequences that predict disjoint bytes.

    Args:
        text: Validation text, a uint8 tensor of shape `(bytes,)`.
        context: Input bytes in a sequence.
        sequences: How many to keep, spread evenly over the text; all of them by default.

    Returns:
        Byte values, an int64 tensor of shape `(sequences, context + 1)`.
    """
    windows = text.unfold(0, context + 1, context)
    if sequences is not None:
        if not 0 < sequences <= len(windows):
            raise ValueError(f"sequences must lie in [1, {len(windows)}], got {sequences}")
        windows = windows[torch.linspace(0, len(windows) - 1, sequences).round().long()]
    return windows.long()
