"""``python -m pydist``: see :mod:`pydist.cli`."""

from __future__ import annotations

import sys

from pydist.cli import main

sys.exit(main())
