"""Which saved parameter is which: by name where there are names, else by place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before all names


def _bare(names: Sequence[str]) -> list[str]:
    """Names without what wrappers put before all of them."""
    result = list(names)
    while any(result and all(x.startswith(w) for x in result) for w in _WRAPPERS):
        result = [x.split(".", 1)[1] for x in result]
    return result


def match(
    param_groups: list[dict[str, Any]], groups: list[dict[str, Any]]
) -> list[tuple[int, list[Any]]]:
    """For each group of an optimizer, the saved group it is and its parameters' keys.

    By name, where both sides have names and they are the same ones in another order, else by
    place, as all of torch's optimizers do.

    Args:
        param_groups: The optimizer's.
        groups: The saved ones; ``"params"`` are keys.

    Raises:
        ValueError: They are of other parameters.
    """
    mine, named = _own_names(param_groups)
    ids = [list(group["params"]) for group in groups]
    if len({key for keys in ids for key in keys}) < sum(map(len, ids)):
        raise ValueError("its param_groups hold a parameter twice")
    theirs = []
    for group, keys in zip(groups, ids, strict=True):
        # torch's checkpoint tools have put the keys, which are names, into this model's order.
        given = keys if any(isinstance(key, str) for key in keys) else group.get("param_names", ())
        named = named and len(given) == len(keys) and all(isinstance(x, str) for x in given)
        theirs.append(list(given))
    counts, saved = [len(x) for x in mine], [len(x) for x in ids]
    if named:
        flat_mine, flat_theirs = (_bare([x for g in side for x in g]) for side in (mine, theirs))
        mine, theirs = _regroup(flat_mine, counts), _regroup(flat_theirs, saved)
        by_name = len(set(flat_mine)) == len(flat_mine) and flat_mine != flat_theirs
        if by_name and sorted(flat_mine) == sorted(flat_theirs):
            return [_find(g, names, theirs, ids) for g, names in enumerate(mine)]
        if by_name and not any(isinstance(key, str) for keys in ids for key in keys):
            gone = sorted(set(flat_theirs) - set(flat_mine))[:3]
            new = sorted(set(flat_mine) - set(flat_theirs))[:3]
            raise ValueError(f"it is of other parameters: {gone} are not here, {new} not there")
    if counts != saved:
        raise ValueError(f"its param_groups have {saved} parameters, the optimizer's {counts}")
    return list(enumerate(ids))


def _own_names(param_groups: list[dict[str, Any]]) -> tuple[list[list[str]], bool]:
    names = [list(group.get("param_names", ())) for group in param_groups]
    counts = [len(group["params"]) for group in param_groups]
    if [len(x) for x in names] == counts:
        return names, True
    return [[""] * n for n in counts], False


def _regroup(flat: list[str], counts: list[int]) -> list[list[str]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(n)] for n in counts]


def _find(
    g: int, names: list[str], theirs: list[list[str]], ids: list[list[Any]]
) -> tuple[int, list[Any]]:
    for i, others in enumerate(theirs):
        if sorted(others) == sorted(names):
            keys = dict(zip(others, ids[i], strict=True))
            return i, [keys[name] for name in names]
    raise ValueError(f"param_groups[{g}] is of other parameters than any of its param_groups")
