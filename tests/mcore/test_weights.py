"""A vocabulary that tensor-parallel ranks share evenly holds fewer stored rows: what each rank reads, joined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sts.mcore import weights
from megatron_sts.mcore.groups import Place

NUM_STORED = 1025


class Stored:
    """An embedding and a head in memory."""

    path = Path("stored")

    def __init__(self) -> None:
        torch.manual_seed(0)
        names = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")
        self.tensors = {name: torch.randn(NUM_STORED, 3) for name in names}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_ranges(self, name: str, dim: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([self.tensors[name].narrow(dim, start, stop - start) for start, stop in ranges], dim)


class Shard(torch.nn.Module):
    """A rank's rows of both."""

    share_embeddings_and_output_weights = False

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.language = torch.nn.Module()
        self.language.embedding = torch.nn.Module()
        self.language.embedding.word_embeddings = torch.nn.Embedding(num_rows, 3)
        self.language.output_layer = torch.nn.Linear(3, num_rows, bias=False)


@pytest.mark.parametrize(("tp_size", "vocab_size"), [(2, 1026), (4, 1028), (4, 2048)])
def test_rows_behind_the_stored_ones_are_their_mean(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, vocab_size: int
) -> None:
    monkeypatch.setattr(weights, "unwrap", lambda shard: shard)
    stored, shards = Stored(), [Shard(vocab_size // tp_size) for _ in range(tp_size)]
    for rank, shard in enumerate(shards):
        here = Place(tp_rank=rank, tp_size=tp_size, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
        monkeypatch.setattr(weights, "place", lambda here=here: here)
        weights.load_part([shard], "language", stored)
    for name, whole in stored.tensors.items():
        rows = torch.cat([dict(shard.named_parameters())[name].detach() for shard in shards])
        assert torch.equal(rows[:NUM_STORED], whole)
        assert torch.equal(rows[NUM_STORED:], whole.mean(0).expand(vocab_size - NUM_STORED, -1))
