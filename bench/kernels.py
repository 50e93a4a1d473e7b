"""``pydist bench kernels``, with the figures held against the project's goals.

python bench/kernels.py
python bench/kernels.py --kernels pack_signs lion_pack_ --dtype float32 --json out.json
python bench/kernels.py --device cuda --plot roofline.png
"""

from __future__ import annotations

import shlex
import sys

from kernel_goals import verdicts

from pydist import cli

if __name__ == "__main__":
    args = cli.parser().parse_args(["bench", "kernels", *sys.argv[1:]])
    args.typed = shlex.join(["python", "bench/kernels.py", *sys.argv[1:]])
    sys.exit(cli.bench_kernels(args, goals=verdicts))
