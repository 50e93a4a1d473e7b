"""A small byte-level transformer language model.

Every byte value is a token, so the model needs no tokenizer: at each position it reads the bytes
so far and predicts the one that follows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


def distance_bias(heads: int, time: int) -> Tensor:
    """Attention biases that make the model causal and tell it how far away a byte is.

    A head's bias falls linearly with distance (ALiBi, arXiv 2108.12409), so no position
    embedding is needed. The first head falls by 1 a byte and sees only the last few; each
    further head falls a quarter as steeply and sees further.

    Args:
        heads: Number of attention heads.
        time: Number of positions.

    Returns:
        Terms to add to the attention logits, shape `(heads, time, time)`; minus infinity where
        a query would read a later position.
    """
    position = torch.arange(time)
    distance = position[:, None] - position  # from query (row) back to key (column)
    slope = 0.25 ** torch.arange(heads)
    return (-slope[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)


class Attention(nn.Module):
    """Multi-head causal self-attention.

    Args:
        width: Size of the residual stream; a multiple of `heads`.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Let each position read from itself and from the positions before it.

        Args:
            x: Activations, shape `(batch, time, width)`.
            bias: Terms to add to the attention logits, shape `(heads, time, time)`.

        Returns:
            Activations of the same shape.
        """
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron.

    Args:
        width: Size of the residual stream.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: Activations, shape `(batch, time, width)`.
            bias: Terms to add to the attention logits, shape `(heads, time, time)`.

        Returns:
            Activations of the same shape.
        """
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """A pre-norm, decoder-only transformer over bytes.

    The output layer has weights of its own and starts at zero, so that the untrained model
    predicts all 256 bytes alike. The other linear layers start with a standard deviation of one
    over the square root of their inputs.

    Args:
        context: Longest sequence the model accepts, in bytes.
        width: Size of the residual stream; a multiple of `heads`.
        depth: Number of blocks.
        heads: Number of attention heads in each block.
        embedding_std: Standard deviation of the initial byte embeddings.
    """

    bias: Tensor

    def __init__(
        self,
        context: int = 64,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        embedding_std: float = 0.3,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("bias", distance_bias(heads, context), persistent=False)

        nn.init.normal_(self.embedding.weight, std=embedding_std)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the byte after each position.

        Args:
            tokens: Byte values, an integer tensor of shape `(batch, time)`, `time <= context`.

        Returns:
            Logits, shape `(batch, time, 256)`.
        """
        time = tokens.shape[1]
        if time > self.bias.shape[-1]:
            raise ValueError(f"sequence of {time} bytes exceeds context {self.bias.shape[-1]}")
        bias = self.bias[:, :time, :time]
        x = self.embedding(tokens)  # (batch, time, width)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))
