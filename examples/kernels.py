"""The kernels on torch tensors and NumPy arrays (CuPy arrays work alike); one process.

python examples/kernels.py
"""

from __future__ import annotations

import numpy as np
import torch

import pydist


def main() -> None:
    """Packs, votes, quantizes and sums, and prints sizes and errors."""
    torch.manual_seed(0)
    workers = torch.randn(3, 10_000)

    # One bit per element: signs, and what most of three workers have.
    payloads = torch.stack([pydist.ops.pack_signs(x) for x in workers])
    planes = pydist.ops.majority_vote(payloads)
    winners = pydist.ops.unpack_signs(planes[0], 10_000)
    assert torch.equal(winners, workers.sign().sum(0).sign())
    print(f"signs: {payloads[0].nbytes:,} bytes for {workers[0].nbytes:,}")

    # Lion's momentum, its sign and the packing in one pass over memory, then the update.
    momentum, weights = torch.zeros(10_000), torch.randn(10_000)
    payload = pydist.ops.lion_pack_(momentum, workers[0], beta1=0.9, beta2=0.99)
    planes = pydist.ops.majority_vote(payload.unsqueeze(0))
    pydist.ops.lion_apply_(weights, planes, lr=1e-4, weight_decay=0.1)

    # Blocks with a scale: 2 to 8 bits per element, summed over workers in one pass.
    for codec in (pydist.QSGD(bits=4), pydist.BlockInt(bits=8), pydist.BlockFloat("e4m3")):
        payloads = torch.stack(
            [pydist.ops.quantize(x, codec, rank=i) for i, x in enumerate(workers)]
        )
        mean = pydist.ops.sum_quantized(payloads, codec, 10_000, mean=True)
        error = (mean - workers.mean(0)).norm() / workers.mean(0).norm()
        print(f"{codec}: {payloads[0].nbytes:,} bytes, relative error {error:.4f}")

    # The same on NumPy arrays, to the same bytes; `out=` takes memory that is there.
    x = workers[0].numpy()
    out = np.empty(payloads.shape[1], dtype=np.uint8)
    pydist.arrays.quantize(x, pydist.BlockFloat("e4m3"), out=out)
    assert np.array_equal(out, payloads[0].numpy())


if __name__ == "__main__":
    main()
