"""What figures from this machine depend on: the card, the versions, the speed of a copy.

    python bench/gpu/facts.py --device cuda --json environment.json

Prints JSON. Ends with 1 where there is no device of that kind, or torch does not see one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "numpy", "setuptools", "pybind11", "cmake", "ninja", "pytest", "pytest-xdist", "rich",
    "cupy-cuda13x", "triton", "bitsandbytes",
)  # fmt: skip
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cmake", "ninja")
QUERY = (
    "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current"
)
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
REPEATS = 10


def packages() -> dict[str, str | None]:
    """Installed versions."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def driver() -> str:
    """What nvidia-smi says of the cards."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi was not found"
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout or done.stderr).strip()


def find_tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit, or of the machine."""
    folders = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer:/usr/local/cuda/nsight-compute"
    return shutil.which(name) or shutil.which(name, path=folders)


def of_torch(device: str) -> dict[str, Any]:
    """torch's own versions, the card as it sees it, and GB/s of a read and a copy."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device")
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["clock_hz"] = 1000 * getattr(properties, "clock_rate", 0)
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
        found["devices"] = torch.cuda.device_count()
    return found | bandwidths(device)


def bandwidths(device: str) -> dict[str, float]:
    """GB/s of a copy and of a read, medians."""
    import torch

    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    work = {"copy": (target.copy_, 2), "read": (lambda x: x.sum(), 1)}
    found = {}
    for name, (call, passes) in work.items():
        seconds = []
        for _ in range(REPEATS + 2):
            start = time.perf_counter()
            call(source)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        gigabytes = passes * source.nbytes / 1e9
        found[f"{name}_gigabytes_per_second"] = gigabytes / statistics.median(seconds[2:])
    return found


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="The card, the versions, the speed of a copy.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "packages": packages(),
        "tools": {name: find_tool(name) is not None for name in TOOLS},
        "nvidia_smi": driver(),
    }
    error = ""
    try:
        record |= of_torch(options.device)
    except (ImportError, RuntimeError, SystemExit) as failure:
        error = record["error"] = str(failure)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if error:
        print(f"environment: {error}", file=sys.stderr)
    else:
        copy = record["copy_gigabytes_per_second"]
        print(f"{record.get('device', 'CPU')}, torch {record['packages']['torch']}, "
              f"copy {copy:.0f} GB/s")  # fmt: skip
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
