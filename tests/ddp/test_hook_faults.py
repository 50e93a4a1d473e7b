"""The hooks in other people's ways of working: copies, readers, formats, frameworks, damage."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_hook_damage as damage
import ranks_hook_faults as cases
import ranks_hook_use as use
import torch
from ranks import World, Worlds
from test_collectives import same_on_all_ranks

import pydist
from pydist import QSGD
from pydist.ddp import CompressionState, compress, restore
from pydist.ddp.optimizers import OptimizerWatch
from pydist.ddp.parameters import Parameters

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(180)]


@pytest.mark.parametrize("exact_skip", [False, True])
def test_readers_change_nothing(worlds: Worlds, exact_skip: bool) -> None:
    same_on_all_ranks(worlds(2).run(cases.read_meanwhile, exact_skip))


# --------------------------------------------------------------------------- copies


def test_copies_go_on(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(cases.copied))


def test_made_before_the_group(worlds: Worlds) -> None:
    state = CompressionState(QSGD(4, block=64), min_numel=100)
    assert not state.bound and state.stats()["world_size"] == 1
    same_on_all_ranks(worlds(2).run(cases.late, copy.copy(state), None))


def test_numbered_states_load_before_backward(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(cases.numbered))


# --------------------------------------------------------------------------- memory formats


@pytest.mark.parametrize("when", [0, 1, 4])
def test_channels_last_after_wrapping(worlds: Worlds, when: int) -> None:
    for algorithm in ("two_phase", "all_gather"):
        same_on_all_ranks(worlds(2).run(cases.turned, when, algorithm))


# --------------------------------------------------------------------------- several backwards


@pytest.mark.parametrize("how", ["usual", "zeros", "no_sync", "view", "static"])
def test_momentum_and_several_backwards(worlds: Worlds, how: str) -> None:
    same_on_all_ranks(worlds(2).run(cases.accumulated, how))


def test_changed_between_backwards(worlds: Worlds) -> None:
    for kind, message in worlds(2).run(cases.clipped_between):
        assert kind == "PydistError" and "changed between two backwards" in message, message


def test_exact_skip_of_several_backwards(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(cases.skipped_accumulation))


# --------------------------------------------------------------------------- checkpoints


def test_frozen_layers_and_sharded(worlds: Worlds, tmp_path: Path) -> None:
    same_on_all_ranks(worlds(2).run(damage.frozen, str(tmp_path)))


def test_damaged_states(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(damage.damaged_states, 40))


@pytest.mark.soak
def test_many_damaged_states(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(damage.damaged_states, 500))


def test_states_of_other_steps(worlds: Worlds) -> None:
    for kind, message in worlds(2).run(damage.other_step):
        assert kind == "MismatchError" and "step" in message, (kind, message)


def test_recipe_of_the_documentation(worlds: Worlds, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ddp.md").read_text()
    begin = text.index('rank, folder, start = dist.get_rank(), Path("checkpoints"), 0')
    code = text[begin : text.index("```", begin)]
    assert code.count("        ...  ") == 0 and code.count("    ...  ") == 1
    code = code.replace("    ...  ", "    train(step)  ").replace("% 1000", "% 2")
    same_on_all_ranks(worlds(2).run(damage.recipe, code, str(tmp_path)))


@pytest.mark.parametrize("what", ["worker", "owner", "momentum"])
def test_damage_is_dropped_and_named(worlds: Worlds, what: str) -> None:
    same_on_all_ranks(worlds(2).run(damage.poisoned, what))


def test_common_damage_raises_everywhere() -> None:
    world = World(2, fork=True, destroy=False)
    try:
        for kind, message in world.run(damage.poisoned_together):
            assert kind == "PydistError" and "decoded different bytes" in message, message
    finally:
        world.kill()


# --------------------------------------------------------------------------- options


def test_names(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(use.names))


def test_many_names() -> None:
    """40,000 parameters are looked up without a search through all of them."""
    named = [(f"layers.{i // 800}.experts.{i % 800}.weight", torch.empty(0)) for i in range(40_000)]
    parameters = Parameters(named)
    assert [parameters.ordinal_of(name) for name, _ in named] == list(range(40_000))
    assert [parameters.ordinal(x) for _, x in named] == list(range(40_000))


def test_warnings(worlds: Worlds) -> None:
    wanted = {
        "pattern": "patterns that match no parameter: ['nothing.*', '*.gone']",
        "adapters": "smaller than min_numel=100000",
        "sign and adam": "residuals made training worse",
        "topk and adamw": "residuals made training worse",
        "twice": "accumulated twice",
        "discarded": "reduced and then zeroed",
        "block": "smaller than min_numel=0, or than a block",
    }
    for found in worlds(2).run(use.warnings_of):
        for what, messages in found.items():
            if what in wanted:
                assert sum(wanted[what] in one for one in messages) == 1, (what, messages)
            else:
                assert not messages, (what, messages)


def test_watches_come_and_go_while_optimizers_step() -> None:
    """torch goes through its hooks while a state is collected, or made."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    watches: list[OptimizerWatch] = []

    def first(_: torch.optim.Optimizer) -> None:
        watches.append(OptimizerWatch(lambda _: True, lambda _: None))
        del watches[0]

    watches += [OptimizerWatch(lambda p: p is param, first) for _ in range(3)]
    counting = OptimizerWatch(lambda p: p is param, lambda _: None)
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    assert counting.count() == 3


# --------------------------------------------------------------------------- frameworks


def test_wrappers(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(use.wrapped))


def test_a_bare_module_alone() -> None:
    net = torch.nn.Linear(40, 40)
    state = compress(net, QSGD(4))
    assert compress(net, QSGD(4)) is state
    net(torch.ones(2, 40)).sum().backward()
    assert state.stats()["steps"] == 0 and state.state_dict()["parameters"] == {}
    state.load_state_dict(state.state_dict())
    restore(net)
    with pytest.raises(ValueError, match="was not called on it"):
        restore(net)


@pytest.mark.parametrize(
    ("what", "mine", "theirs"),
    [
        ("keyword", "unexpected keyword argument 'warmup_stepz'", "rank 1"),
        ("model", "got Linear, which holds none", "rank 1"),
        ("again", "already with other arguments", "rank 1"),
        ("copy", "a model with other parameters", "rank 1"),
    ],
)
def test_wrong_on_one_rank(worlds: Worlds, what: str, mine: str, theirs: str) -> None:
    for rank, (kind, message) in enumerate(worlds(2).run(use.one_rank_wrong, what)):
        assert kind and (mine if rank == 1 else theirs) in message, (rank, kind, message)


@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_inputs(worlds: Worlds, ranks: int) -> None:
    same_on_all_ranks(worlds(ranks).run(use.joined))


def test_hook_in_a_hook(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(use.hook_in_hook))


def test_thawed_layers_and_tied_weights(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(use.thawed))


def test_another_type_after_wrapping(worlds: Worlds) -> None:
    same_on_all_ranks(worlds(2).run(use.mixed_types))


def test_interrupted_while_a_peer_is_stuck() -> None:
    world = World(2, fork=True, destroy=False)
    try:
        assert world.run(use.interrupted)[0] == "KeyboardInterrupt"
    finally:
        world.kill()


# --------------------------------------------------------------------------- types

RIGHT = """
import pydist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

def use(ddp: DDP, model: nn.Module) -> None:
    codec: pydist.Codec = pydist.QSGD(bits=4)
    state = pydist.ddp.compress(ddp, codec, warmup_steps=10, momentum=0.5, exclude=["*.bias"])
    pydist.ddp.compress(ddp, {"*": codec, "head": None}, error_feedback="auto", op="mean")
    pydist.ddp.compress(model, state)
    sharded = pydist.fsdp.compress(model, gradients=codec, error_feedback=True, min_numel=3)
    number: float = sharded.scalars()["step"] + state.scalars()["ratio"]
    pydist.ddp.restore(ddp)
    pydist.fsdp.restore(model)
"""
WRONG = (
    "pydist.ddp.compress(ddp, codec, warmup_stepz=10)",
    "pydist.ddp.compress(ddp, codec, warmup_steps='ten')",
    "pydist.ddp.compress(ddp, codec, error_feedback='always')",
    "pydist.ddp.compress(ddp, 4)",
    "pydist.fsdp.compress(model, gradient=codec)",
    "pydist.fsdp.compress(model, gradients='QSGD')",
    "pydist.ddp.CompressionState(codec, op='median')",
)


def test_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    path = tmp_path / "use.py"
    path.write_text(RIGHT + "".join(f"    {call}\n" for call in WRONG))
    first = len(RIGHT.splitlines()) + 1
    # As `make lint` runs it, whose cache it then shares.
    command = [sys.executable, "-m", "mypy", str(path)]
    root = Path(pydist.__file__).parents[1]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=170)
    lines = [int(one.split(":")[1]) for one in found.stdout.splitlines() if ": error:" in one]
    assert sorted(set(lines)) == list(range(first, first + len(WRONG))), found.stdout
