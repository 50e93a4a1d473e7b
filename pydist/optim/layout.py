"""What optimizers ask of their parameters, and how they tell the other ranks about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pydist.formats import wire
from pydist.kernels import checks
from pydist.kernels.torch_tensors import check_storage
from pydist.optim.shards import check_placements, part_of
from pydist.training.dtensor import is_sharded, local_of
from pydist.transport.communicator import Call

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# --------------------------------------------------------------------------- all parameters


class Layout:
    """All parameters of an optimizer as they are at one moment.

    Frameworks change parameters behind an optimizer's back: they move them to another device,
    freeze and thaw them, or put others in their place (FSDP2 by Accelerate). Every step therefore
    compares what it finds with the layout of the last one (:func:`glance`), and all ranks compare
    the digests of theirs. Elements are numbered in the memory order that a parameter had at first,
    whatever memory format it has later.

    Args:
        param_groups: The optimizer's.
        settings: What else must be equal on all ranks, JSON types.
        before: The layout before, whose memory orders hold on.

    Attributes:
        params: All parameters; a parameter's place here is its ordinal.
        glances: What :func:`glance` said of each.
        names: Their names, quoted, where names were given; else their places.
        places: Each parameter's ordinal and its group's place.
        orders: Each parameter's memory order: the strides of this rank's part of it at first.
        active: Ordinals of those that are trained; the others are left alone, whatever they are.
        sharded: Those that are DTensors.
        fields: All that must be equal on all ranks.
        digest: Checksum of ``fields``.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        settings: dict[str, Any],
        before: Layout | None = None,
    ) -> None:
        self.params = [p for group in param_groups for p in group["params"]]
        self.glances = [glance(p) for p in self.params]
        self.names = names_of(param_groups)
        self.places: dict[Tensor, tuple[int, int]] = {}
        for g, group in enumerate(param_groups):
            for p in group["params"]:
                self.places[p] = (len(self.places), g)
        self.orders = [strides_of(p) for p in self.params]
        if before is not None:
            self._inherit(before)
        self.active = [i for i, p in enumerate(self.params) if is_active(p)]
        self.sharded = [p for p in self.params if is_sharded(p)]
        self.fields = settings | self._described()
        self.digest = Call("layout", self.fields).digest

    def _described(self) -> dict[str, Any]:
        """Name, dtype, shape and memory order of every parameter that is trained."""
        fields: dict[str, Any] = {"parameters": len(self.params)}
        for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            _, active, dtype, _, shape = self.glances[i]
            if not active:
                fields[f"parameter {i}"] = [name, "frozen"]
                continue
            fields[f"parameter {i}"] = [name, str(dtype), list(shape), self.orders[i]]
            if is_sharded(p):
                fields[f"shard of parameter {i}"] = part_of(p)
        return fields

    def is_current(self, param_groups: list[dict[str, Any]]) -> bool:
        """Whether the parameters are still as they were."""
        seen, n = self.glances, 0
        for group in param_groups:
            for p in group["params"]:
                if n == len(seen) or glance(p) != seen[n]:
                    return False
                n += 1
        return n == len(seen)

    def check(self, *, shards: bool) -> None:
        """Raises TypeError or ValueError unless the kernels can work with what is trained."""
        trained = [self.params[i] for i in self.active]
        check_parameters(trained, shards=shards)
        devices = {local_of(p).device for p in trained}
        if len(devices) > 1:
            raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
        if devices and next(iter(devices)).type not in ("cpu", "cuda"):
            raise ValueError(f"params must be on cpu or cuda, got {next(iter(devices))}")

    @property
    def has_values(self) -> bool:
        """Whether the trained parameters have values, as those on the meta device do not yet."""
        return all(self.glances[i][3].type != "meta" for i in self.active)

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return self.glances[self.active[0]][3] if self.active else torch.device("cpu")

    def came_from(self, other: Layout) -> dict[int, int]:
        """Which parameters of another layout these are, by ordinal.

        One that was put in the place of another is that one.
        """
        found = {i: other.places[p][0] for i, p in enumerate(self.params) if p in other.places}
        if self.names == other.names:
            taken = found.keys() | set(found.values())
            found |= {i: i for i in range(len(self.params)) if i not in taken}
        return found

    def _inherit(self, before: Layout) -> None:
        for i, j in self.came_from(before).items():
            if self.glances[i][4] == before.glances[j][4]:
                self.orders[i] = before.orders[j]


def is_active(p: Tensor) -> bool:
    """Whether a parameter is trained: as torch's optimizers, by its gradient, or soon to be."""
    return p.requires_grad or p.grad is not None


def first_device(params: object) -> torch.device:
    """Where the first trained parameter is, of what was given to an optimizer; else the CPU."""
    for given in params if isinstance(params, list | tuple) else ():
        if isinstance(given, dict):
            members = given.get("params")
            if isinstance(members, Tensor):
                members = [members]
            if isinstance(members, Iterator):
                members = given["params"] = list(members)
            found = first_device(members)
            if found.type != "cpu":
                return found
        for p in given if isinstance(given, tuple) else (given,):
            if isinstance(p, Tensor) and is_active(p):
                return local_of(p).device
    return torch.device("cpu")


def memory_of(p: Tensor) -> tuple[Any, ...]:
    """What memory a tensor is: dtype, device, shape."""
    return p.dtype, p.device, p.shape


def strides_of(p: Tensor) -> tuple[int, ...]:
    """Of what this rank has of a parameter; nothing where it is not laid out by strides."""
    local = local_of(p)
    return local.stride() if local.layout is torch.strided else ()


def glance(p: Tensor) -> tuple[Any, ...]:
    """All of a parameter that a step relies on: identity, training, dtype, device, memory."""
    return id(p), is_active(p), *memory_of(local_of(p))


def names_of(param_groups: Iterable[dict[str, Any]]) -> list[str]:
    """A name for every parameter, quoted, where names were given; else its place."""
    names: list[str] = []
    for group in param_groups:
        params, given = group["params"], group.get("param_names", ())
        fits = len(given) == len(params)  # someone may have edited the group
        names += [repr(x) for x in given] if fits else [""] * len(params)
    return [name or f"parameter {i}" for i, name in enumerate(names)]


def check_parameters(params: Iterable[Tensor], *, shards: bool) -> None:
    """Raises unless the kernels can work with the parameters, wherever they are.

    Args:
        params: The parameters.
        shards: DTensors are taken.
    """
    for given in params:
        check_placements(given)
        p = local_of(given) if shards else given
        if type(p) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"params must be plain tensors, got {type(p).__name__}")
        if p.dtype not in FLOATS:
            raise TypeError(f"params must be float32, float16 or bfloat16, got {p.dtype}")
        if p.layout is not torch.strided or not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise TypeError(
                "params must be dense in memory, got "
                + (f"strides {p.stride()}" if p.layout is torch.strided else str(p.layout))
            )


# --------------------------------------------------------------------------- options


def check_number(name: str, value: object) -> float:
    """A number, or a tensor of one element (a learning rate may be one), as a float.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_rates(group: dict[str, Any]) -> None:
    """Raises unless a group's learning rate and weight decay are numbers that float32 holds."""
    lr, weight_decay = (check_number(name, group[name]) for name in ("lr", "weight_decay"))
    checks.check_rates(lr, weight_decay)


def check_betas(betas: object) -> None:
    """Raises ValueError unless there are two, each in [0, 1)."""
    good = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not good or not all(0 <= check_number("betas", beta) < 1 for beta in betas):  # type: ignore[attr-defined]
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def check_count(name: str, value: object, least: int = 0) -> int:
    """An integer that is not smaller than ``least``; raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name} must be from {least} to 2**63 - 1, got {value}")
    return int(value)


def check_finite(name: str, value: object) -> float:
    """A finite number; raises TypeError or ValueError."""
    number = check_number(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


# --------------------------------------------------------------------------- gradients


def in_order(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """A tensor in a memory order: itself, or a copy."""
    if x.stride() == order:
        return x
    return torch.empty_strided(x.shape, order, dtype=x.dtype, device=x.device).copy_(x)


def check_gradient(name: str, grad: Tensor, p: Tensor) -> None:
    """Raises, naming the parameter, unless the kernels can read its gradient."""
    if grad.layout != torch.strided:
        raise TypeError(f"gradient of {name} is sparse ({grad.layout})")
    if type(grad) is not Tensor:
        raise TypeError(f"gradient of {name} must be a plain tensor, got {type(grad).__name__}")
    if grad.dtype not in FLOATS:
        raise TypeError(
            f"gradient of {name} must be float32, float16 or bfloat16, got {grad.dtype}"
        )
    if grad.shape != p.shape:
        raise ValueError(
            f"gradient of {name} has shape {list(grad.shape)}, the parameter {list(p.shape)}"
        )
    if grad.device != p.device:
        raise ValueError(f"gradient of {name} is on {grad.device}, the parameter on {p.device}")
    check_storage(f"gradient of {name}", grad)
    check_storage(name, p)


def sample_of(grads: list[Tensor]) -> bytes:
    """The first elements of every gradient; nothing where one of them is not finite."""
    parts = [grad.reshape(-1)[:64].float().cpu() for grad in grads]
    sample = torch.cat([torch.zeros(1, dtype=torch.float32, device="cpu"), *parts])
    return sample.numpy().tobytes() if bool(sample.isfinite().all()) else b""


def shaped(flat: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """A view of what is flat in a memory order."""
    return flat.as_strided(shape, order, flat.storage_offset())


def which_has(has: np.ndarray) -> Tensor:
    """One bit per parameter, the first one lowest, padded to payload words."""
    bits = np.packbits(has, bitorder="little")
    padded = np.zeros(wire.payload_bytes(len(has)), dtype=np.uint8)
    padded[: len(bits)] = bits
    return torch.from_numpy(padded)


def any_rank_has(all_metadata: Tensor, count: int) -> np.ndarray:
    """Which parameters any rank has, from the bits of all ranks, uint8 [ranks, bytes]."""
    bits = np.bitwise_or.reduce(all_metadata.cpu().numpy(), axis=0)
    return np.unpackbits(bits, count=count, bitorder="little").astype(bool)
