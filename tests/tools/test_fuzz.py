"""Damaged payloads against the compiled decoders under AddressSanitizer and UBSan: ``make fuzz``.

The programs are in tests/fuzz. The ordinary tests fuzz too, without a sanitizer and between
forbidden pages (tests/kernels/test_elias.py), and through Python (below).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydist import QSGD, BlockFloat, BlockInt, Sign, arrays, ops
from pydist.formats import wire

ROOT = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("PYDIST_FUZZ_RUNS", "1500000"))
OTHERS = ("blocks", "votes", "values", "topk", "trits")
SECONDS = os.environ.get("PYDIST_FUZZ_SECONDS", "60")
TALLY = re.compile(r"^(\w+) +(\d+) payloads, (\d+) malformed, ([\d.]+) s, no error$", re.MULTILINE)


def build(folder: str, *options: str, **environment: str) -> Path:
    """Compiles the programs; only what has changed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    where = ROOT / "build" / folder
    configure = [
        cmake, "-S", ROOT / "tests" / "fuzz", "-B", where, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}", *options,
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", where]):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}
        )
        assert done.returncode == 0, f"building {where} failed:\n{done.stdout}{done.stderr}"
    return where / "fuzz"


def run(*command: Any) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.mark.soak
def test_damaged_payloads_under_address_sanitizer() -> None:
    program = build("fuzz")
    report = run(program, "--runs", RUNS, "elias")
    report += run(program, "--runs", RUNS // 5, *OTHERS)
    print(f"\n{report}", end="")
    tallies = {name: (int(runs), int(bad)) for name, runs, bad, _ in TALLY.findall(report)}
    assert tallies.keys() == {"elias", *OTHERS}
    assert tallies["elias"][0] == RUNS and tallies["elias"][1] > 0.6 * RUNS


@pytest.mark.soak
def test_payloads_that_coverage_chooses() -> None:
    """libFuzzer, where ``make fuzz FUZZER=libfuzzer`` asks for it."""
    if os.environ.get("PYDIST_FUZZER") != "libfuzzer":
        pytest.skip("make fuzz FUZZER=libfuzzer asks for it")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }')
        command = ["clang++", "-fsanitize=fuzzer,address", probe, "-o", Path(folder, "probe")]
        if not shutil.which("clang++") or subprocess.run(command, capture_output=True).returncode:
            pytest.fail(
                "no clang++ with libFuzzer; on Debian and Ubuntu `make fuzz-tools` installs it"
            )
        program = build("libfuzzer", "-DLIBFUZZER=1", "-DCMAKE_CXX_COMPILER=clang++")
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        report = run(program, f"-max_total_time={SECONDS}", "-max_len=4096", "-print_final_stats=1",
                     f"-artifact_prefix={ROOT}/build/libfuzzer/", corpus)  # fmt: skip
    executed = re.search(r"number_of_executed_units: +(\d+)", report)
    assert executed
    print(f"\nlibFuzzer: {int(executed[1]):,} inputs in {SECONDS} s, no error")


# --------------------------------------------------------------------------- through Python

CODECS = [
    QSGD(4, 64, entropy="elias"), QSGD(2, 32, "l2", entropy="elias"), QSGD(8, 96, entropy="elias"),
    QSGD(3, 32), Sign("l1", 32), BlockInt(7, 64), BlockFloat("e5m2", 32),
]  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(CODECS), st.integers(0, 300), st.binary(max_size=300),
       st.integers(0, 2**32 - 1), st.booleans())  # fmt: skip
def test_any_bytes_through_the_doors(
    codec: Any, n: int, data: bytes, seed: int, made: bool
) -> None:
    """They decode, or raise ValueError; both doors answer alike."""
    payload = np.frombuffer(data, dtype=np.uint8).copy()
    if made:  # some bytes of a proper payload overwritten
        x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
        payload = arrays.quantize(x, codec, seed=seed)
        at = seed % (payload.size + 1)
        some = np.frombuffer(data[: payload.size - at][:4], dtype=np.uint8)
        payload[at : at + some.size] = some
    answers = []
    for door, native in ((arrays, payload), (ops, torch.from_numpy(payload))):
        try:
            values = np.asarray(door.dequantize(native, codec, n))
            answers.append(values.tobytes())
            assert values.shape == (n,)
        except ValueError as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


@given(st.binary(max_size=40))
def test_any_header(data: bytes) -> None:
    """Parsed, or said to be malformed; what was parsed packs to the same bytes."""
    header, reason = wire.unpack_header(data)
    if reason is None:
        assert header.pack() == data[: wire.HEADER_BYTES]
    else:
        assert len(data) < 16 or data[:5] != wire.MAGIC + bytes([wire.WIRE_VERSION])
