"""Sphinx's roles in docstrings, as Markdown: :func:`x` becomes `x`."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """A module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
