"""Builds `pydist._C`, as tools/build_module.py does; all else about the package: pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_module


class CMakeBuild(build_ext):
    """Leaves the work to CMake."""

    def build_extension(self, ext: Extension) -> None:
        python = build_module.Python.at(sys.executable)
        assert python is not None
        module = build_module.build(python, kind="Debug" if self.debug else "Release")
        build_module.install(module, Path(self.get_ext_fullpath(ext.name)))


# pyproject.toml has two ways to name the license: setuptools before 77 refuses the one, and later
# releases the other. Named here, any from 61.3 on takes it.
setup(
    license="Apache-2.0",
    ext_modules=[Extension("pydist._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
