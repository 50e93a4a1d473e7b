"""Builds `pydist._C` with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: PYDIST_CUDA, PYDIST_PTXAS, CMAKE_CUDA_ARCHITECTURES and TORCH_CUDA_ARCH_LIST (see
CMakeLists.txt), CMAKE_ARGS (more arguments for CMake), MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, directory_attribute: str) -> str:
    """Path of cmake or ninja: the wheel of this Python environment, else the one on PATH."""
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
        found = shutil.which(name, path=str(directory))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(f"pydist: {name} was not found; `{sys.executable} -m pip install {name}`")
    return found


def run(command: list[str]) -> None:
    """Runs a command; where it fails, its own messages say why and a traceback would bury them."""
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(f"pydist: `{shlex.join(command[:2])} ...` failed with {code}; see above")


class CMakeBuild(build_ext):
    """Configures and builds in build/<python>-<platform>, which later builds reuse."""

    def build_extension(self, ext: Extension) -> None:
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")

        # Given anew each time: in build isolation these are paths that the next build won't find.
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run(configure)

        jobs = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        parallel = ["--parallel", jobs] if jobs else []  # Ninja's own default is all cores
        run([cmake, "--build", str(build), *parallel])

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Unlinked first: a running process may have the old module mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(build / Path(self.get_ext_filename("_C")).name, target)


setup(
    ext_modules=[Extension("pydist._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
