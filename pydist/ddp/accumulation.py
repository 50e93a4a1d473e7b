"""Steps of several backwards: what of a gradient has been reduced already.

Each backward of DDP that synchronises hands its hook the whole of ``p.grad``: the new gradient,
and what an earlier backward has left there since it was zeroed, which is a result of all ranks.
Where that matters, because what is done to a gradient is not linear in it, the two are told apart:
just before the first gradient of a backward arrives, ``p.grad`` is looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydist.training.buffers import real


@dataclass
class _Held:
    """What was left in a parameter's gradient.

    Attributes:
        grad: The gradient.
        version: Of its memory then.
        view: The gradient too, where it lies in one of DDP's buckets, which live on anyway.
        reduced: What of it has been reduced over the ranks; ``None``: all.
        changed: It was neither left alone nor zeroed since.
    """

    grad: weakref.ref[Tensor]
    version: int
    view: Tensor | None
    reduced: Tensor | None = None
    changed: bool = False

    @classmethod
    def of(cls, grad: Tensor) -> _Held:
        """A gradient all of which has been reduced."""
        return cls(weakref.ref(grad), grad._version, grad if grad._is_view() else None)

    def moved_to(self, grad: Tensor) -> bool:
        """Whether a gradient is the same in another place, as DDP makes its buckets anew."""
        return self.view is not None and torch.equal(self.view, grad)


class Accumulation:
    """Watches the gradients of some parameters.

    Attributes:
        zeroed: Gradients that had been reduced were zeroed; stays until it is set back.
    """

    def __init__(self) -> None:
        self._moved: set[int] = set()
        self._may_have_moved: dict[int, Tensor] = {}  # bool []
        self.zeroed = False
        self._held: dict[int, _Held] = {}
        self._params: dict[int, Tensor] = {}
        self._hooks: dict[int, Any] = {}
        self._running: Callable[[], object] = lambda: None

    @property
    def moved(self) -> set[int]:
        """Ordinals whose momentum has moved since their gradient was zeroed.

        In the later backwards of a step this waits for the device that knows it.
        """
        for ordinal, moved in self._may_have_moved.items():
            if bool(moved):
                self._moved.add(ordinal)
        self._may_have_moved = {}
        return self._moved

    def have_moved(self, kept: Iterable[int], keeps: dict[int, Tensor]) -> None:
        """Takes note of momenta that have moved, in as far as a device says so."""
        self._may_have_moved.update(keeps)
        self._moved.update(ordinal for ordinal in kept if ordinal not in keeps)

    def watch(self, ordinals: Iterable[int], params: Iterable[Tensor]) -> bool:
        """Watches some more parameters, but for those without ``requires_grad``.

        Returns:
            Whether that is all of them.
        """
        whole = True
        for ordinal, param in zip(ordinals, params, strict=True):
            self._params[ordinal] = param
            if ordinal not in self._hooks and param.requires_grad:
                self._hooks[ordinal] = param.register_hook(_caller(weakref.ref(self)))
            whole = whole and ordinal in self._hooks
        return whole

    def close(self) -> None:
        """Watches no more."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def arrives(self) -> None:
        """The first gradient of a backward is about to be added to ``p.grad``."""
        if self._running() is not None:
            return

        def over() -> None:
            self._note()

        # The backward holds it, also one that raises: as long as it lives, that one runs.
        self._running = weakref.ref(over)
        self._look()
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(over)

    def _look(self) -> None:
        before, unsure = bool(self._held), []
        for ordinal, held in list(self._held.items()):
            grad = self._params[ordinal].grad
            moved = grad is not None and held.grad() is not grad and held.moved_to(grad)
            if grad is None or not (moved or held.grad() is grad):
                del self._held[ordinal]
            elif not moved and grad._version != held.version:
                unsure.append((ordinal, grad))
            elif held.reduced is None:
                held.reduced = grad.detach().clone()
        for ordinal, grad in unsure:
            if bool(grad.any() if not grad.is_sparse else grad.coalesce().values().any()):
                self._held[ordinal].changed = True
            else:
                del self._held[ordinal]
        self._moved &= self._held.keys()
        self._may_have_moved = {
            ordinal: moved
            for ordinal, moved in self._may_have_moved.items()
            if ordinal in self._held
        }
        self.zeroed = self.zeroed or (before and not self._held)

    def _note(self) -> None:
        """A backward is over: its gradients lie in ``p.grad``, reduced or not."""
        for ordinal, held in self._held.items():
            grad = self._params[ordinal].grad
            if grad is not None:
                held.grad, held.version = weakref.ref(grad), grad._version
                held.view = grad if grad._is_view() else None

    def reduced(self) -> None:
        """A backward is over that synchronised: all that lies in ``p.grad`` was reduced."""
        self._held = {
            ordinal: _Held.of(param.grad)
            for ordinal, param in self._params.items()
            if param.grad is not None
        }

    def forget(self) -> None:
        """Nothing that lies in ``p.grad`` counts as reduced."""
        self._held.clear()
        self._moved.clear()
        self._may_have_moved.clear()

    @property
    def continues(self) -> bool:
        """Whether the backward that runs belongs to the step of an earlier one."""
        return bool(self._held)

    def base(self, ordinal: int) -> Tensor | None:
        """What of a parameter's gradient has been reduced before, in its shape, if anything.

        Raises:
            ValueError: It cannot be told, as the gradient was changed in between.
        """
        held = self._held.get(ordinal)
        if held is None:
            return None
        if held.changed:
            raise ValueError(
                "its gradient was changed between two backwards of one step (clipped, unscaled, "
                "divided?), and what has been reduced of it can't be told from what is new"
            )
        grad = held.reduced if held.reduced is not None else self._params[ordinal].grad
        assert grad is not None
        return real(grad.to_dense() if grad.is_sparse else grad)


def _caller(watcher: weakref.ref[Accumulation]) -> Any:
    def arrives(_: Tensor) -> None:
        if (found := watcher()) is not None:
            found.arrives()

    return arrives
