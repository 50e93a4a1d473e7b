"""The DDP hook of a voting optimizer: votes travel while backward still runs.

This module has no postponed annotations: DDP checks the hook's annotations as objects.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pydist.training import reducer

if TYPE_CHECKING:
    from pydist.optim.voting import VotingOptimizer

_ADVICE = (
    "an attached optimizer votes during backward, before gradients can be clipped, unscaled "
    "or changed. Use the plain path: do not call attach(), run backward under ddp.no_sync() (or "
    "without DDP) and call step()"
)


class Attachment:
    """What ties an optimizer to a DDP model.

    A copied or pickled DDP model has one that is tied to nothing.

    Args:
        optimizer: The optimizer whose parameters vote.
        ddp: The DDP model they belong to.

    Raises:
        ValueError: The optimizer lacks parameters of the model.

    Attributes:
        optimizer: The optimizer.
        voted: Ordinals of the parameters that were voted on since the last step.
    """

    def __init__(self, optimizer: "VotingOptimizer", ddp: DistributedDataParallel) -> None:
        self.optimizer = optimizer
        self.voted: set[int] = set()
        self._ddp = weakref.ref(ddp)
        ignored = ddp.parameters_to_ignore
        self._reduced = {
            id(p)
            for name, p in ddp.module.named_parameters()
            if p.requires_grad and name not in ignored
        }
        owned = {id(p) for p in optimizer.parameters()}
        names = {id(p): name for name, p in ddp.named_parameters()}
        if missing := [names[i] for i in self._reduced - owned]:
            missing.sort(key=list(names.values()).index)
            raise ValueError(f"ddp: parameters that the optimizer does not have: {missing[:5]}")
        # Versions and checksums of the gradients that were voted on, by ordinal.
        self._versions: dict[int, tuple[int, int]] = {}
        self._sums: dict[int, Tensor] = {}
        self._again = False
        self._used: set[int] | None = None
        self._handles: list[Any] = []
        if ddp.find_unused_parameters or ddp.static_graph:
            self._watch_used(ddp)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (Attachment,)

    def _watch_used(self, ddp: DistributedDataParallel) -> None:
        """Notes which parameters get a gradient; DDP gives the others zeros.

        The hook on a parameter runs before DDP learns of its gradient, so it is always in time.
        """
        used = self._used = set()

        def note(param: Tensor) -> None:
            used.add(id(param))

        for param in ddp.parameters():
            if id(param) in self._reduced:
                self._handles.append(param.register_post_accumulate_grad_hook(note))

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The model, unless it is gone."""
        return self._ddp()

    @property
    def tracks_usage(self) -> bool:
        """Whether ranks may lack gradients; otherwise DDP insists that they have all."""
        return self._used is not None

    def reduces(self, param: Tensor) -> bool:
        """Whether a parameter is in one of DDP's buckets."""
        return id(param) in self._reduced

    def guard(self) -> None:
        """From now on other optimizers cannot step on the model's parameters."""
        me = weakref.ref(self)

        @torch.compiler.disable
        def check(stepping: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            attachment = me()
            if attachment is not None:
                attachment.refuse(stepping)

        handle = register_optimizer_step_pre_hook(check)
        self._handles.append(handle)
        weakref.finalize(self, handle.remove)

    def refuse(self, stepping: torch.optim.Optimizer) -> None:
        """Raises RuntimeError where another optimizer steps on the model.

        Its gradients are those of one rank alone, so that replicas would drift apart.
        """
        # A wrapper of the attached optimizer may itself be an optimizer.
        if self.ddp is None or any(
            x is self.optimizer for x in (stepping, *vars(stepping).values())
        ):
            return
        if any(self.reduces(p) for group in stepping.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(stepping).__name__}.step(): a {type(self.optimizer).__name__} is attached "
                "to the DDP model of these parameters, whose gradients are those of one rank: call "
                "its detach() first"
            )

    def end(self) -> None:
        """Takes the hook out of DDP."""
        for handle in self._handles:
            handle.remove()
        ddp = self.ddp
        if ddp is not None:
            reducer.forget_hook(ddp, vote_hook)
            reducer.build_reducer(ddp)

    # ----------------------------------------------------------------- a bucket

    def gradient(
        self, ordinal: int, param: Tensor, given: Tensor, *, joined: bool
    ) -> Tensor | None:
        """This rank's gradient of a parameter in a bucket, ``None`` where it has none.

        Args:
            ordinal: The parameter's.
            param: The parameter.
            given: Its part of the bucket.
            joined: This rank has no data (``ddp.join()``).
        """
        if joined:
            return None if self.tracks_usage else torch.zeros_like(param)
        if self._used is not None and id(param) not in self._used:
            return None
        # The bucket is in the memory order that the parameter had when DDP laid it out.
        grad = given.as_strided(param.size(), param.stride()) if param.grad is None else param.grad
        shared = grad.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        self._sums[ordinal] = _checksum(given) if shared else given
        return grad

    def vote_again(self, ordinal: int) -> bool:
        """Notes that a parameter is voted on; whether it was before."""
        again = ordinal in self.voted
        self.voted.add(ordinal)
        self._again = self._again or again
        return again

    def end_backward(self) -> None:
        """Once backward, DDP's part included, is over: notes the versions of all gradients."""
        engine: Any = torch.autograd.Variable._execution_engine
        again = self._again

        def over() -> None:
            if again:
                self.optimizer.give_up()
            self._versions = {
                i: (id(p.grad), p.grad._version)
                for i, p in enumerate(self.optimizer.parameters())
                if p.grad is not None and i in self._sums
            }

        # DDP queues its own last callback after this hook returns; one more turn puts ours behind.
        engine.queue_callback(lambda: engine.queue_callback(over))

    # ----------------------------------------------------------------- a step

    def changed_gradient(self) -> int | None:
        """The ordinal of a gradient that has other values than were voted on."""
        for i, p in enumerate(self.optimizer.parameters()):
            noted, grad = self._versions.get(i), p.grad
            if noted is None or grad is None or (id(grad), grad._version) == noted:
                continue
            given = self._sums[i]
            wanted = _checksum(given) if given.is_floating_point() else given
            if not torch.equal(_checksum(grad), wanted):
                return i
        return None

    def refuse_changed(self, name: str) -> None:
        """Raises RuntimeError as a gradient changed after backward."""
        raise RuntimeError(f"the gradient of {name} was changed after backward: " + _ADVICE)

    def check_scaler(self) -> None:
        """Raises RuntimeError where step() was called by a GradScaler."""
        if hasattr(self.optimizer, "grad_scale"):
            raise RuntimeError("step() was called by a GradScaler: " + _ADVICE)

    def done(self) -> None:
        """Ends a step."""
        self.voted.clear()
        self._versions.clear()
        self._sums.clear()
        self._again = False
        if self._used is not None:
            self._used.clear()


def _checksum(grad: Tensor) -> Tensor:
    """The sum of the elements' bits, int64: in any memory order, without waiting for a device."""
    bits = torch.int32 if grad.element_size() == 4 else torch.int16
    return grad.detach().view(bits).sum()


def vote_hook(state: Attachment, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Votes with a bucket's local gradients; ``p.grad`` keeps them as they are.

    Args:
        state: The optimizer's attachment.
        bucket: DDP's bucket.

    Returns:
        A completed future of the bucket's own buffer.
    """
    joined = not reducer.in_backward()  # DDP.join() calls hooks of ranks that ran out of data
    state.optimizer.vote_bucket(state, bucket, joined=joined)
    if bucket.is_last():
        if joined:
            state.optimizer.step_joined()
        else:
            state.end_backward()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# --------------------------------------------------------------------------- one optimizer a model


def attach(optimizer: "VotingOptimizer", ddp: DistributedDataParallel) -> Attachment:
    """Registers the hook; see :meth:`pydist.optim.voting.VotingOptimizer.attach`."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}")
    for hook, state in reducer.hooks_of(ddp):
        if hook is vote_hook and hasattr(state, "optimizer"):
            other = type(state.optimizer).__name__
            raise RuntimeError(f"ddp: another {other} is attached to it: call its detach() first")
    attachment = Attachment(optimizer, ddp)
    reducer.register(ddp, attachment, vote_hook)
    attachment.guard()
    return attachment
