"""The kernel benchmark; the same as ``pydist bench kernels``.

python bench/kernels.py
python bench/kernels.py --kernels pack_signs lion_pack_ --dtype float32 --json out.json
python bench/kernels.py --device cuda --plot roofline.png
"""

from __future__ import annotations

import sys

from pydist.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
