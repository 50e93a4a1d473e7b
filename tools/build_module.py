"""Builds the compiled module with CMake; for `make gpu`, `make gpu-module` and setup.py.

    python tools/build_module.py                              # for this Python, into pydist/
    python tools/build_module.py --for 3.12 --cuda 90         # for another, and for sm_90

Environment: PYDIST_CUDA, PYDIST_PTXAS, CMAKE_CUDA_ARCHITECTURES and TORCH_CUDA_ARCH_LIST (see
CMakeLists.txt), CMAKE_ARGS (more arguments for CMake), MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pydist"
_ASK = """
import json, os, sys, sysconfig
print(json.dumps({
    "tag": f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}",
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "version": "%d.%d" % sys.version_info[:2],
    "headers": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
}))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter, and how its compiled modules are called.

    Attributes:
        path: Its program.
        tag: Distinguishes build folders.
        suffix: Ends a module's file name.
        version: Such as ``3.12``.
        headers: Whether it has those that a module needs.
    """

    path: str
    tag: str
    suffix: str
    version: str
    headers: bool

    @classmethod
    def at(cls, path: str) -> Python | None:
        """The interpreter of a program; None where it does not run."""
        try:
            done = subprocess.run([path, "-c", _ASK], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return cls(path, **json.loads(done.stdout)) if done.returncode == 0 else None


def python_of(version: str) -> Python:
    """A Python of this version with headers: from PATH, or pyenv's."""
    found = [python for path in _candidates(version) if (python := Python.at(path))]
    usable = [python for python in found if python.version == version and python.headers]
    if not usable:
        why = "found, but without headers" if found else "not found"
        raise SystemExit(
            f"pydist: Python {version} was {why} on PATH and among those of pyenv; "
            f"`pyenv install {version}`, or on Debian and Ubuntu: apt install python{version}-dev"
        )
    return usable[0]


def _candidates(version: str) -> Iterator[str]:
    yield sys.executable
    if on_path := shutil.which(f"python{version}"):
        yield on_path
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        for folder in sorted((Path(root) / "versions").glob(f"{version}*"), reverse=True):
            yield str(folder / "bin" / "python")


# --------------------------------------------------------------------------- which sources


def sources_id() -> str:
    """40 hexadecimal digits of all that the module is made of; its build-id."""
    files = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").rglob("*"), *(ROOT / "csrc").rglob("*")]
    found = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:40]


def is_current(module: Path) -> bool:
    """Whether a module was built from the sources that are here."""
    return bytes.fromhex(sources_id()) in module.read_bytes()


# --------------------------------------------------------------------------- the build


def _tool(name: str, directory_attribute: str) -> str | None:
    """Path of cmake or ninja: the wheel of this Python environment, else the one on PATH."""
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
        found = shutil.which(name, path=str(directory))
    except (ImportError, AttributeError):
        found = None
    return found or shutil.which(name)


def _run(command: list[str]) -> None:
    """Runs a command; where it fails, its own messages say why and a traceback would bury them."""
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(f"pydist: `{shlex.join(command[:2])} ...` failed with {code}; see above")


def build(python: Python, *arguments: str, kind: str = "Release") -> Path:
    """Configures and builds in build/<tag>, which later builds reuse.

    Args:
        python: Whom the module is for.
        *arguments: More of them for CMake.
        kind: ``Release`` or ``Debug``.

    Returns:
        The module's file.
    """
    folder = ROOT / "build" / python.tag
    folder.mkdir(parents=True, exist_ok=True)
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    if cmake is None:
        raise SystemExit(f"pydist: cmake was not found; `{sys.executable} -m pip install cmake`")
    # Given anew each time: in build isolation these are paths that the next build won't find.
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={python.path}",
        f"-DCMAKE_BUILD_TYPE={kind}", f"-DPYDIST_SOURCES={sources_id()}",
    ]  # fmt: skip
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        configure.append(f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}")
    except ImportError:
        pass  # CMake may know one of its own, or says what is missing
    _run([*configure, *arguments, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
    jobs = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    if jobs is None and ninja is None:
        jobs = str(os.cpu_count())  # Ninja's own default is all cores
    _run([cmake, "--build", str(folder), *(["--parallel", jobs] if jobs else [])])
    return folder / f"_C{python.suffix}"


def install(module: Path, target: Path) -> None:
    """Copies a module to where it is imported from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # first: a running process may have the old module mapped
    shutil.copy2(module, target)


def main() -> None:
    """Builds for the Python that was asked for."""
    parser = argparse.ArgumentParser(description="Builds pydist's compiled module with CMake.")
    parser.add_argument("--for", dest="version", metavar="VERSION", help="such as 3.12")
    parser.add_argument("--cuda", metavar="ARCH", help="with CUDA, for this one, such as 90")
    options = parser.parse_args()
    python = python_of(options.version) if options.version else Python.at(sys.executable)
    assert python is not None
    arguments = []
    if options.cuda:
        arguments = ["-DPYDIST_CUDA=1", f"-DCMAKE_CUDA_ARCHITECTURES={options.cuda}"]
    module = build(python, *arguments)
    install(module, PACKAGE / module.name)
    print(f"pydist/{module.name}: {module.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
