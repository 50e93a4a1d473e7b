"""Codecs: frozen values that say how numbers become bytes. No process group, no state, no torch."""

from __future__ import annotations

from pydist.codecs.block import BlockFloat, BlockInt
from pydist.codecs.qsgd import QSGD
from pydist.codecs.raw import Raw
from pydist.codecs.sign import Sign
from pydist.codecs.ternary import Ternary
from pydist.codecs.topk import TopK

Codec = Sign | QSGD | BlockInt | BlockFloat | Raw | Ternary | TopK
"""Any codec, for annotations and ``isinstance``."""

__all__ = ["QSGD", "BlockFloat", "BlockInt", "Codec", "Raw", "Sign", "Ternary", "TopK"]
