"""The DDP hook of a voting optimizer: votes travel while backward still runs.

This module has no postponed annotations: DDP checks the hook's annotations as objects.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from pydist.optim.voting import VotingOptimizer

_ADVICE = (
    "an attached optimizer votes during backward, before gradients can be clipped, unscaled "
    "or changed. Use the plain path: do not call attach(), run backward under ddp.no_sync() (or "
    "without DDP) and call step()"
)


class Attachment:
    """What ties an optimizer to a DDP model.

    Args:
        optimizer: The optimizer whose parameters vote.
        ddp: The DDP model they belong to.
    """

    def __init__(self, optimizer: "VotingOptimizer", ddp: DistributedDataParallel) -> None:
        self.optimizer = optimizer
        self.pending: set[int] = set()
        self._versions: dict[int, tuple[int, int]] = {}
        self._used: set[int] | None = None
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [n for n, p in ddp.named_parameters() if p.requires_grad and id(p) not in owned]
        if missing:
            raise ValueError(f"ddp: parameters that the optimizer does not have: {missing[:5]}")
        if ddp.find_unused_parameters or ddp.static_graph:
            self._watch_used(ddp)

    def _watch_used(self, ddp: DistributedDataParallel) -> None:
        """Notes which parameters get a gradient; DDP gives the others zeros.

        The hook on a parameter runs before DDP learns of its gradient, so it is always in time.
        """
        self._used = set()

        def note(param: torch.Tensor) -> None:
            assert self._used is not None
            self._used.add(id(param))

        for param in ddp.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(note)

    @property
    def tracks_usage(self) -> bool:
        """Whether ranks may lack gradients; otherwise DDP insists that they have all."""
        return self._used is not None

    def has_gradient(self, param: torch.Tensor) -> bool:
        """Whether this rank used the parameter since the last step."""
        return self._used is None or id(param) in self._used

    def watch_gradients(self) -> None:
        """Notes the versions of all gradients once backward, DDP's part included, is over."""
        engine: Any = torch.autograd.Variable._execution_engine
        # DDP queues its own last callback after this hook returns; one more turn puts ours behind.
        engine.queue_callback(lambda: engine.queue_callback(self._note_versions))

    def _note_versions(self) -> None:
        self._versions = {
            i: (id(p.grad), p.grad._version)
            for i, p in enumerate(self.optimizer.parameters())
            if p.grad is not None
        }

    def check_gradients(self) -> None:
        """Raises RuntimeError where a gradient changed after backward."""
        for i, p in enumerate(self.optimizer.parameters()):
            noted = self._versions.get(i)
            now = None if p.grad is None else (id(p.grad), p.grad._version)
            if now != noted and now is not None:
                raise RuntimeError(
                    f"the gradient of {self.optimizer.name_of(i)} was changed after backward: "
                    + _ADVICE
                )

    def check_scaler(self) -> None:
        """Raises RuntimeError where step() was called by a GradScaler."""
        if hasattr(self.optimizer, "grad_scale"):
            raise RuntimeError("step() was called by a GradScaler: " + _ADVICE)

    def done(self) -> None:
        """Ends a step."""
        self.pending.clear()
        self._versions.clear()
        if self._used is not None:
            self._used.clear()


def vote_hook(state: Attachment, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Votes with a bucket's local gradients; ``p.grad`` keeps them as they are.

    Args:
        state: The optimizer's attachment.
        bucket: DDP's bucket.

    Returns:
        A completed future of the bucket's own buffer.
    """
    state.optimizer.vote_bucket(state, bucket)
    if bucket.is_last():
        state.watch_gradients()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
