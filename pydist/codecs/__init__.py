"""Codecs: frozen values that say how numbers become bytes. No process group, no state."""

from __future__ import annotations

from pydist.codecs.sign import Sign

__all__ = ["Sign"]
