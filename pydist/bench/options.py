"""The arguments of ``pydist bench kernels``; imports nothing heavy, so that help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

FAMILIES = {
    "signs": ("pack_signs", "unpack_signs", "count_votes", "majority_vote"),
    "lion": ("lion_pack_", "lion_apply_"),
    "blocks": (
        "quantize",
        "dequantize",
        "quantize_feedback_",
        "sum_quantized",
        "reduce_quantized",
    ),
    "elias": ("elias_encode", "elias_decode"),
    "ternary": (
        "ternary_scale",
        "ternary_pack",
        "ternary_unpack",
        "ternary_sum",
        "ternary_unpack_sums",
    ),
    "topk": ("topk_select", "topk_scatter", "topk_feedback_", "topk_reduce"),
    "raw": ("sum_values",),
}
KERNELS = tuple(kernel for family in FAMILIES.values() for kernel in family)
DTYPES = ("float32", "bfloat16", "float16")
SIZES = {
    "cpu": ("64Ki", "1Mi", "32Mi"),
    "cuda": ("64Ki", "256Ki", "1Mi", "4Mi", "16Mi", "64Mi", "256Mi"),
}
# Measured first, should there be a budget: those that decide, and one of torch.compile.
FIRST_SIZES = {"cpu": ("32Mi",), "cuda": ("64Mi", "64Ki", "256Mi", "256Ki")}
_UNITS = {"": 0, "Ki": 10, "Mi": 20, "Gi": 30}


def size(text: str) -> int:
    """Elements from text such as ``64Ki``, ``32Mi`` or ``1048576``; an argparse type."""
    number = text.rstrip("KMGi")
    unit = text[len(number) :]
    if not number.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be like 64Ki, 32Mi or 1048576, got {text!r}")
    elements = int(number) << _UNITS[unit]
    if elements <= 0 or elements % 32:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of 32, got {text}")
    return elements


def family_of(kernel: str) -> str:
    """The family a kernel belongs to."""
    return next(family for family, kernels in FAMILIES.items() if kernel in kernels)


def in_order(sizes: Iterable[int], device: str) -> list[int]:
    """Sizes in the order of measuring: those that decide, then the others, upwards."""
    first = [size(text) for text in FIRST_SIZES[device]]
    return sorted(sizes, key=lambda n: (first.index(n) if n in first else len(first), n))


def compiled_size(sizes: Sequence[int], device: str) -> int:
    """The size at which torch.compile is a rival: the one that decides, or else the largest."""
    first = size(FIRST_SIZES[device][0])
    return first if first in sizes else max(sizes)


def shown(elements: int) -> str:
    """The inverse of :func:`size`, as short as it gets."""
    for unit, shift in reversed(_UNITS.items()):
        if elements % (1 << shift) == 0:
            return f"{elements >> shift}{unit}"
    raise AssertionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the benchmark can be told."""
    add = parser.add_argument
    parser.epilog = f"kernels: {', '.join(KERNELS)}"
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add(
        "--sizes",
        type=size,
        nargs="+",
        metavar="N",
        help="elements, such as 64Ki 32Mi; default on the CPU "
        f"{' '.join(SIZES['cpu'])}, on CUDA {' '.join(SIZES['cuda'])}",
    )
    add(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=list(KERNELS),
        metavar="KERNEL",
        help="kernels to measure; default all of those below",
    )
    add(
        "--without",
        nargs="+",
        choices=KERNELS,
        default=[],
        metavar="KERNEL",
        help="kernels to leave out",
    )
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        metavar="DTYPE",
        help=f"of {', '.join(DTYPES)}; default all",
    )
    add("--threads", type=int, nargs="+", metavar="N", help="on the CPU; default 1 2")
    add("--isa", help="instruction set of the CPU kernels; default the best")
    add("--repeats", type=int, default=20, metavar="N", help="samples of each row; default 20")
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no further row after this long, and say which were left out; the sizes that "
        "decide come first",
    )
    add("--no-rivals", action="store_true", help="the kernels alone")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="put torch.compile beside the kernels at one size, the one that decides or else the "
        "largest, after all else; default on CUDA only, since it costs some seconds per row",
    )
    add(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="measure each family of kernels at each size in a process of its own, so that a "
        "crash, a hang or a broken CUDA context ends that one alone; default on CUDA only",
    )
    add(
        "--row-seconds",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="with --isolate: a row that takes longer hangs; default 60",
    )
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time that the thread had a core, where others use the machine; one thread only",
    )
    add("--json", metavar="FILE", help="write all figures here, after every row")
    add("--table", metavar="FILE", help="write the table here, as text")
    add("--plot", metavar="FILE", help="draw GB/s against bytes here (.png, .svg, .pdf)")
    add("--compare", metavar="FILE", help="JSON of an earlier run: print what changed")
    add(
        "--compare-module",
        metavar="FILE",
        help="another build of the compiled module: measure each row with both, one right after "
        "the other, and print the ratios (implies --isolate)",
    )
