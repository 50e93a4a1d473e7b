"""`pytest -p aarch64.plugin`: the tests with the kernels of AArch64; see remote.py."""

from aarch64 import remote
from hypothesis import settings

remote.install()
settings.register_profile("soak", deadline=None, max_examples=2000)
