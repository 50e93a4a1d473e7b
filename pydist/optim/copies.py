"""What a copy of an optimizer knows of the process group."""

from __future__ import annotations

import torch.distributed as dist


class GroupOf:
    """A process group as an optimizer holds it: copies in this process share it, pickles lose it.

    Args:
        process_group: The group; ``None`` is the world, which every process finds again.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, *, lost: bool = False) -> None:
        self._process_group, self._lost = process_group, lost

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group.

        Raises:
            ValueError: It was one of the user's, and this came out of a pickle.
        """
        if self._lost:
            raise ValueError(
                "this optimizer came out of a pickle, and had a process group of its own: give it "
                "one with bind(group)"
            )
        return self._process_group

    def __deepcopy__(self, memo: object) -> GroupOf:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickled, (self._lost or self._process_group is not None,)


def _unpickled(lost: bool) -> GroupOf:
    return GroupOf(None, lost=lost)
