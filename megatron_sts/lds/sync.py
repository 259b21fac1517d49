"""Agreement on skip masks: rank 0's masks reach every rank a block of steps ahead and are checked there.

Every rank draws the masks itself; the exchange only proves that all drew the same, because ranks that skip different
layers would otherwise hang in, or silently corrupt, the collectives of those layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.mask import SkipMask, draw_mask

MASK_FIELDS = ("alpha", "epsilon", "schedule", "depth_profile", "sampler", "fixed_layers")
"""The LDS settings that decide which masks are drawn."""
MAX_NAMED_RANKS = 8
"""An error names at most so many ranks."""


class MaskMismatchError(RuntimeError):
    """Ranks would skip different layers. Raised on every rank of the group, with the same text."""


class MaskPlan:
    """The masks of one stage, the same on every rank of ``group`` (None: all ranks; no communication when alone).

    ``mask`` must be called by every rank of the group with the same steps. The first call that enters a block of
    ``block_steps`` steps communicates, always in this order: broadcast from the group's rank 0; all_reduce of "some
    rank differs"; and only if one does, all_gather of what differs, after which every rank raises MaskMismatchError.
    Each waits at most the group's timeout. ``device`` is where the group's backend wants its tensors.
    """

    def __init__(
        self,
        lds: LdsConfig,
        seed: int,
        stage: int,
        num_steps: int,
        num_layers: int,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        block_steps: int = 64,
    ) -> None:
        self._lds, self._seed, self._stage = lds, seed, stage
        self._num_steps, self._num_layers = num_steps, num_layers
        self._group, self._device, self._block_steps = group, device, block_steps
        self._block: list[SkipMask] = []
        self._start = -1
        self._step = 0

    def mask(self, step: int) -> SkipMask:
        """The mask of ``step``; communicates when the step lies outside the current block."""
        if not 0 <= step < self._num_steps:
            raise ValueError(f"step {step} is outside the stage's {self._num_steps} steps")
        start = step // self._block_steps * self._block_steps
        if start != self._start:
            block = [self._draw(s) for s in range(start, min(start + self._block_steps, self._num_steps))]
            self._agree(start, block)
            self._start, self._block = start, block
        self._step = step
        return self._block[step - start]

    def residual_scales(self, step: int) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        """What decides the masks, and the digest of the last one handed out (step 0 before the first)."""
        return {**self._fingerprint(), "step": self._step, "digest": self._draw(self._step).digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint of this stage whose masks this plan would not have drawn."""
        step = state["step"]
        own = self._fingerprint()
        changed = [
            f"{name} {state.get(name)!r} -> {value!r}" for name, value in own.items() if state.get(name) != value
        ]
        if not changed and (digest := self._draw(step).digest) != state["digest"]:
            changed = [f"digest of the mask {state['digest']} -> {digest}, although all settings agree"]
        if changed:
            raise ConfigError(
                f"lds: resuming after step {step} would draw other skip masks than the stage began with "
                f"(checkpoint -> config): {'; '.join(changed)}. Restore these settings or start the stage anew"
            )
        self._step = step

    def _draw(self, step: int) -> SkipMask:
        return draw_mask(self._lds, self._seed, self._stage, step, self._num_steps, self._num_layers)

    def _fingerprint(self) -> dict[str, Any]:
        lds = {
            f"lds.{name}": value for name, value in self._lds.model_dump(mode="json", include=set(MASK_FIELDS)).items()
        }
        run = {"seed": self._seed, "stage": self._stage, "num_steps": self._num_steps, "num_layers": self._num_layers}
        return {**run, **dict(sorted(lds.items()))}

    def _agree(self, start: int, block: list[SkipMask]) -> None:
        """Compares this rank's block with rank 0's; raises on all ranks of the group if any differs."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1):
            return
        own = self._payload(start, block)
        from_rank_0 = own.clone()
        dist.broadcast(from_rank_0, group=self._group, group_src=0)
        differs = (own != from_rank_0).any().int()
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=self._group)
        if differs.item():
            payloads = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(payloads, own, group=self._group)
            raise MaskMismatchError(self._explain([payload.cpu().numpy() for payload in payloads]))

    def _payload(self, start: int, block: list[SkipMask]) -> torch.Tensor:
        """uint8 [16 + block_steps * num_layers]: stage and first step as int64, then the bits, zero past the end."""
        header = np.array([self._stage, start], dtype=np.int64).view(np.uint8)
        bits = np.zeros((self._block_steps, self._num_layers), dtype=np.uint8)
        bits[: len(block)] = [mask.rows[0] for mask in block]
        return torch.from_numpy(np.concatenate([header, bits.ravel()])).to(self._device)

    def _explain(self, payloads: list[np.ndarray]) -> str:
        ranks = dist.get_process_group_ranks(self._group)
        different = [r for r, payload in enumerate(payloads) if not np.array_equal(payload, payloads[0])]
        lines = [f"rank {ranks[r]}: {self._difference(payloads[r], payloads[0])}" for r in different[:MAX_NAMED_RANKS]]
        if len(different) > MAX_NAMED_RANKS:
            lines.append(f"and {len(different) - MAX_NAMED_RANKS} more ranks")
        return (
            f"LDS skip masks differ from those of rank {ranks[0]} on {len(different)} of {len(ranks)} ranks; "
            f"{'; '.join(lines)}. Seed, LDS settings, number of steps and NumPy must be the same on every rank"
        )

    def _difference(self, payload: np.ndarray, reference: np.ndarray) -> str:
        (stage, start), (stage_0, start_0) = payload[:16].view(np.int64), reference[:16].view(np.int64)
        if (stage, start) != (stage_0, start_0):
            return f"asks for stage {stage}, steps from {start}, instead of stage {stage_0}, steps from {start_0}"
        differs = (payload[16:] != reference[16:]).reshape(self._block_steps, self._num_layers)
        rows = np.flatnonzero(differs.any(axis=1))
        layers = ", ".join(map(str, np.flatnonzero(differs[rows[0]])))
        return f"stage {stage}, step {start + rows[0]}, layers {layers} ({len(rows)} steps of the block differ)"
