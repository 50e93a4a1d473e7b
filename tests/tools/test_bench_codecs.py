"""The codec benchmark: its figures follow from what was sent; speed is no test's business."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pydist

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="not a source tree")
SHAPES = [(256, 16), (33,), (48, 64)]
FOREIGN = ("bitsandbytes", "hivemind")


@pytest.fixture(scope="module")
def bench() -> Any:
    """The modules of bench/codecs/compare.py, as its directory sees them."""
    names = ("methods", "rivals", "plot", "compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "codecs"))
        for package in FOREIGN:  # installed or not: seconds to import
            patch.setitem(sys.modules, package, None)
        modules = {name: importlib.import_module(name) for name in names}
        yield modules
        for name in names:
            del sys.modules[name]


@pytest.fixture
def gradients(tmp_path: Path) -> Path:
    numel = sum(math.prod(shape) for shape in SHAPES)
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(2, 1, 1, numel, generator=generator)
    own = torch.randn(2, 3, 4, numel, generator=generator)
    file = tmp_path / "gradients.pt"
    parameters = [(f"p{i}", shape) for i, shape in enumerate(SHAPES)]
    torch.save({"gradients": 1e-3 * (common + 0.5 * own), "parameters": parameters}, file)
    return file


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_writes_everything_down(
    bench: Any, gradients: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench["compare"].timing, "cold_bytes", lambda device: 1)
    monkeypatch.setattr(bench["compare"].timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(bench["compare"], "NORMAL_SIDE", 128)
    files = {suffix: tmp_path / "new" / f"out.{suffix}" for suffix in ("json", "png")}
    out = ["--json", str(files["json"]), "--plot", str(files["png"])]
    small = ["--gradients", str(gradients), "--numel", "1000", "--repeats", "2"]
    assert bench["compare"].main([*small, *out]) == 0
    said = capsys.readouterr().out
    record = json.loads(files["json"].read_text())
    assert record["command"].startswith("python bench/codecs/compare.py --gradients")
    assert set(record["missing"]) == set(bench["rivals"].OTHERS)
    assert "not measured: hivemind UNIFORM_8BIT: ModuleNotFoundError" in said
    rows = {row["method"]: row for row in record["results"]}
    assert len(rows) == len(record["results"]), "two methods have one name"
    assert {method.name for method in bench["methods"].CODECS} < rows.keys()
    for name, row in rows.items():
        for found in row["inputs"].values():
            assert 0 < found["bits"] <= 32 and len(found["errors_of_runs"]) in (1, 2), name
        for what in ("encode", "decode"):
            assert len(row["times"][what]["samples"]) == 2, name
        # What no code can do for normal numbers (but for the luck of 2**16 of them).
        normal = row["inputs"]["normal"]
        assert normal["error"] > 0.97 * bench["plot"].bound(normal["bits"]), name
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_figures_of_a_codec_are_those_of_what_it_sends(bench: Any) -> None:
    methods = bench["methods"]
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    layers = [x[:700], x[700:]]
    for codec in (pydist.QSGD(4), pydist.Sign("l1"), pydist.Sign(None), pydist.BlockFloat("e5m2")):
        method = methods.CodecMethod(codec)
        sent = method.send(layers)
        form = codec.block_format
        own = [form.payload_bytes(n) if form else 4 * -(-n // 32) for n in (700, 300)]
        assert sent.bytes == sum(own), codec
        for i, (value, part) in enumerate(zip(sent.values, layers, strict=True)):
            assert torch.equal(value, pydist.simulate.all_gather([part], codec, seed=i)[0])
        # What is timed is the same encoding and decoding.
        slot = methods.Slot(x=layers[0].clone(), out=torch.zeros(700))
        method.encode(slot)
        assert slot.message.numel() == own[0]
        method.decode(slot)
        assert torch.equal(slot.out, sent.values[0]), codec
    assert methods.name_of(pydist.QSGD(4, norm="l2")) == "QSGD(4, norm='l2')"


def test_errors(bench: Any) -> None:
    comparison = bench["compare"].Comparison()
    comparison.add([torch.tensor([1.0, 0.0]), torch.tensor([2.0])],
                   [torch.tensor([1.0, 2.0]), torch.tensor([2.0])])  # fmt: skip
    assert comparison.error(True) == pytest.approx(2 / 3)
    cosine = 5 / math.sqrt(5 * 9)
    assert comparison.cosine() == pytest.approx(cosine)
    assert comparison.error(False) == pytest.approx(math.sqrt(1 - cosine**2))
    assert bench["plot"].bound(3.0) == 1 / 8


def test_power_sgd_finds_a_low_rank_and_warm_start_helps(bench: Any) -> None:
    rivals, codecs = bench["rivals"], bench["compare"]
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(64, 2, generator=generator) for _ in range(2))
    layers = [left @ right.T, torch.randn(5, generator=generator)]
    sent = rivals.PowerSGD(2, warm=False).send(layers)
    assert sent.bytes == 4 * (2 * (64 + 64) + 5)
    torch.testing.assert_close(sent.values[0], layers[0], rtol=0, atol=1e-4)
    assert torch.equal(sent.values[1], layers[1])
    # One gradient in many steps: a warm start is a power iteration toward the best rank.
    decay = torch.diag(0.8 ** torch.arange(64.0))
    steps = [[[torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] @ decay]]] * 6
    cold, warm = (
        codecs.compare(rivals.PowerSGD(2, warm=warm), [steps])["error"] for warm in (False, True)
    )
    best = math.sqrt(0.64**2)  # of the tail of a geometric series
    assert best - 1e-4 < warm < best + 0.01 < cold


def test_casts_have_the_size_and_the_scale_they_say(bench: Any) -> None:
    cast, small = bench["rivals"].Cast, [1e-4 * torch.randn(64, 8)]
    alone, scaled = (cast(torch.float8_e4m3fn, scaled=scaled) for scaled in (False, True))
    assert alone.send(small).bytes == 512 and scaled.send(small).bytes == 516
    assert not alone.send(small).values[0].any()  # below its smallest number
    error = (scaled.send(small).values[0] - small[0]).norm() / small[0].norm()
    assert 0 < error < 0.05
    whole = bench["rivals"].Cast(torch.bfloat16).mean([[torch.full((3,), 1.0)]] * 3)
    assert torch.equal(whole[0], torch.full((3,), 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gradients", "/nowhere/g.pt"], "no file /nowhere/g.pt; make it with"),
        (["--repeats", "-1"], "--repeats"),
    ],
)
def test_wrong_usage(bench: Any, arguments: list[str], message: str, capsys: Any) -> None:
    try:
        status = bench["compare"].main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_gradients_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("data", "lion", "methods", "model", "train", "gradients")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "language_model"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    made = importlib.import_module("gradients")
    settings = sys.modules["methods"].Settings(width=16, depth=1, heads=2, context=16, warmup=2)
    torch.set_num_threads(1)
    try:
        found = made.collect(settings, workers=2, at=[0, 3], length=2)
        again = made.collect(settings, workers=2, at=[3], length=1)
    finally:
        for name in names:
            sys.modules.pop(name, None)
    kept = found["gradients"]
    sizes = [math.prod(shape) for _, shape in found["parameters"]]
    assert kept.shape == (2, 2, 2, sum(sizes)) and kept.isfinite().all()
    assert torch.equal(kept[1, 0], again["gradients"][0, 0])
    assert not torch.equal(kept[1, 0, 0], kept[1, 0, 1])  # every worker has its own batch
    assert not torch.equal(kept[0, 0], kept[0, 1])
