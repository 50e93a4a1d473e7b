"""What figures depend on, apart from the command."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from pydist.kernels.environment import package_version


def machine() -> dict[str, Any]:
    """Processor, cores, kernel, versions, and what else was running."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": numeric(platform.release()),
        "python": platform.python_version(),
        "torch": package_version("torch") or "not installed",
        "load_before": os.getloadavg()[0],
    }


def numeric(release: str) -> str:
    """The version of a kernel without what the one who built it added."""
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else "unknown"
