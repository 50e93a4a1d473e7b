"""Sphinx's markup in docstrings, as Markdown: :func:`x` becomes `x`, and two colons one."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`")
CODE_FOLLOWS = re.compile(r"::$", re.MULTILINE)


class Roles(Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """A module, class, function or attribute."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = CODE_FOLLOWS.sub(":", text)
