"""Codecs: frozen values that say how numbers become bytes. No process group, no state, no torch."""

from __future__ import annotations

from pydist.codecs.block import BlockFloat, BlockInt
from pydist.codecs.qsgd import QSGD
from pydist.codecs.raw import Raw
from pydist.codecs.sign import Sign
from pydist.codecs.ternary import Ternary
from pydist.codecs.topk import TopK

__all__ = ["QSGD", "BlockFloat", "BlockInt", "Raw", "Sign", "Ternary", "TopK"]
