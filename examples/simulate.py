"""What would 64 workers get from a codec? One process, the same bits as on real ranks.

python examples/simulate.py
"""

from __future__ import annotations

import torch

import pydist

CODECS = (
    pydist.QSGD(bits=8), pydist.QSGD(bits=4), pydist.BlockInt(bits=4), pydist.QSGD(bits=2),
    pydist.Ternary(), pydist.Sign("l1"), pydist.TopK(0.01),
)  # fmt: skip


def main() -> None:
    """Means of 64 gradients, codec by codec: bits per element and error."""
    torch.manual_seed(0)
    common = torch.randn(100_000)  # what all workers agree on, and noise of each
    gradients = [common + 4 * torch.randn(100_000) for _ in range(64)]
    exact = torch.stack(gradients).mean(0)
    print(f"{'codec':<50} {'bits':>5} {'error':>6} {'cosine':>7}")
    for codec in CODECS:
        mean = pydist.simulate.all_reduce(gradients, codec, op="mean")
        bits = 8 * codec.payload_bytes(100_000) / 100_000
        error = (mean - exact).norm() / exact.norm()
        cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
        print(f"{codec!s:<50} {bits:5.2f} {error:6.3f} {cosine:7.3f}")


if __name__ == "__main__":
    main()
