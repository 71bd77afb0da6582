"""gpt.py: the model, the text and the loader of the demo: a small GPT that reads Python's standard
library byte by byte.

Nothing here knows about checkpoints, except that the loader can say where it is.
"""

import pathlib
import sysconfig

import torch
from torch import nn

VOCAB = 256  # bytes
CONTEXT = 64
DIM = 257  # odd, so that rows are split unevenly over 2 and 3 ranks
HEADS = 1
LAYERS = 8
CORPUS_BYTES = 2 << 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(
            nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(batch, length, 3, HEADS, DIM // HEADS)
            .permute(2, 0, 3, 1, 4)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, DIM))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(CONTEXT, DIM)
        self.dropout = nn.Dropout(
            0.1
        )  # draws random numbers: a resume that forgets the generator cannot match
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def corpus() -> torch.Tensor:
    """The first 2 MiB of the sources of Python's standard library, files in the order of their
    names, as a byte tensor.
    """
    text = bytearray()
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    return torch.frombuffer(text[:CORPUS_BYTES], dtype=torch.uint8)


class Loader:
    """Deals consecutive windows of the text to the ranks. Its position counts windows over all
    ranks.
    """

    def __init__(self, rank: int, ranks: int, batch: int) -> None:
        self._text = corpus()
        self._rank, self._ranks, self._batch = rank, ranks, batch
        self.position = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs and targets, each [batch, CONTEXT] of int64."""
        windows = (len(self._text) - 1) // CONTEXT
        first = self.position + self._rank * self._batch
        rows = [((first + i) * 7919 % windows) * CONTEXT for i in range(self._batch)]
        block = torch.stack([self._text[r : r + CONTEXT + 1] for r in rows]).long()
        self.position += self._ranks * self._batch
        return block[:, :-1], block[:, 1:]

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]
