"""Agreement on skip masks: rank 0's digests reach every rank a block of steps ahead and are checked there.

Every rank draws the masks itself; the exchange only proves that all drew the same, because ranks that skip different
layers would otherwise hang in, or silently corrupt, the collectives of those layers. What is exchanged are digests, of
the same size whatever a rank believes the layers and micro-batches to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.effective import executed_fraction, inverse_keep_scales
from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import Placement

UPDATE_FIELDS = {"skipped_update", "residual_scale"}
"""The LDS settings that do not decide which masks are drawn."""
ROUNDS_FIELDS = {"rounds", "head_yields"}
"""Those that only ``sampler: rounds`` reads."""
MASK_FORMAT = 2
"""Goes up when the same settings draw other masks than before."""
NUM_HEADER_FIELDS = 5
"""Stage, first step, the stage's number of steps, rows a mask, layers."""
MAX_NAMED_RANKS = 8
"""An error names at most so many ranks."""


class MaskMismatchError(RuntimeError):
    """Ranks would skip different layers. Raised on every rank of the group, with the same text."""


class MaskPlan:
    """The masks of one stage, the same on every rank of ``group`` (None: all ranks; no communication when alone).

    ``mask`` must be called by every rank of the group with the same steps. The first call that enters a block of
    ``block_steps`` steps communicates, always in this order: broadcast of the block's digests from the group's rank 0;
    all_reduce of "some rank differs"; and only if one does, all_gather of the digests and, if the ranks' headers
    agree, of the masks, after which every rank raises MaskMismatchError. Each waits at most the group's timeout.

    ``num_microbatches``: per data-parallel rank and step. ``device`` is where the group's backend wants its tensors.
    """

    def __init__(
        self,
        lds: LdsConfig,
        seed: int,
        stage: int,
        num_steps: int,
        placement: Placement,
        num_microbatches: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        block_steps: int = 64,
    ) -> None:
        self._lds, self._seed, self._stage, self._num_steps = lds, seed, stage, num_steps
        self._placement, self._num_microbatches = placement, num_microbatches
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
            steps = range(start, min(start + self._block_steps, self._num_steps))
            block = [self._draw(s, self._placement, self._num_microbatches) for s in steps]
            self._agree(start, block)
            self._start, self._block = start, block
        self._step = step
        return self._block[step - start]

    def residual_scales(self, step: int) -> Sequence[float] | None:
        """What each layer's contribution to the residual stream is multiplied by in ``step``, [num_layers]; None: 1."""
        if self._lds.residual_scale == "none":
            return None
        return inverse_keep_scales(self._lds, step, self._num_steps, self._placement)

    def executed_fraction(self) -> list[float]:
        """Expected share of the stage's micro-batches in which each layer runs, [num_layers]."""
        return executed_fraction(self._lds, self._num_steps, self._placement).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What decides the masks, the layout they are drawn for and the last one's digest (step 0 before the first)."""
        layout = {
            "owner": list(self._placement.owner),
            "round": list(self._placement.round),
            "fixed_work": list(self._placement.fixed_work),
            "head_work": self._placement.head_work,
            "num_microbatches": self._num_microbatches,
        }
        digest = self._draw(self._step, self._placement, self._num_microbatches).digest
        return {**self._fingerprint(), "layout": layout, "step": self._step, "digest": digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on from a checkpoint of this stage whose masks this plan would not have drawn.

        Refused are other LDS settings, seed, stage or number of layers: each would change the probabilities or tie the
        rest of the run to other random numbers. Another layout (owners, rounds, fixed work, micro-batches) is not:
        ``bernoulli`` masks do not depend on it, and those of the other samplers follow it from the next step on, with the
        same scheduled probabilities. Nor is another number of steps, which is asked for with ``--extend``: the
        probabilities follow it from the next step on. The digest, drawn again for the layout and number of steps of the
        checkpoint, shows whether generator and samplers are still the same.
        """
        step = state["step"]
        own = self._fingerprint()
        changed = [
            f"{name} {state.get(name)!r} -> {value!r}"
            for name, value in own.items()
            if name != "num_steps" and state.get(name) != value
        ]
        if not changed and (digest := self._digest_for(state)) != state["digest"]:
            changed = [f"digest of the mask {state['digest']} -> {digest}, although all settings agree"]
        if changed:
            raise ConfigError(
                f"lds: resuming after step {step} would draw other skip masks than the stage began with "
                f"(checkpoint -> config): {'; '.join(changed)}. Restore these settings or start the stage anew"
            )
        self._step = step

    def _digest_for(self, state: dict[str, Any]) -> str:
        layout, step = state["layout"], state["step"]
        head_work = layout.get("head_work", 0.0)  # before there were rounds nothing asked for it
        placement = Placement(
            tuple(layout["owner"]), tuple(layout["round"]), tuple(layout["fixed_work"]), head_work=head_work
        )
        return draw_mask(
            self._lds, self._seed, self._stage, step, state["num_steps"], placement, layout["num_microbatches"]
        ).digest

    def _draw(self, step: int, placement: Placement, num_microbatches: int) -> SkipMask:
        return draw_mask(self._lds, self._seed, self._stage, step, self._num_steps, placement, num_microbatches)

    def _fingerprint(self) -> dict[str, Any]:
        others = set() if self._lds.sampler == "rounds" else ROUNDS_FIELDS
        settings = self._lds.model_dump(mode="json", exclude=UPDATE_FIELDS | others)
        run = {"format": MASK_FORMAT, "seed": self._seed, "stage": self._stage, "num_steps": self._num_steps}
        lds = {f"lds.{name}": value for name, value in sorted(settings.items())}
        return {**run, "num_layers": self._placement.num_layers, **lds}

    def _agree(self, start: int, block: list[SkipMask]) -> None:
        """Compares this rank's block with rank 0's; raises on all ranks of the group if any differs."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1):
            return
        own = self._summary(start, block)
        from_rank_0 = own.clone()
        dist.broadcast(from_rank_0, group=self._group, group_src=0)
        differs = (own != from_rank_0).any().int()
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=self._group)
        if differs.item():
            ranks = dist.get_process_group_ranks(self._group)
            summaries = self._gather(own)
            same_header = all(
                np.array_equal(summary[:NUM_HEADER_FIELDS], summaries[0][:NUM_HEADER_FIELDS]) for summary in summaries
            )
            masks = self._gather(self._bits(block)) if same_header else None
            raise MaskMismatchError(explain(ranks, summaries, masks))

    def _summary(self, start: int, block: list[SkipMask]) -> torch.Tensor:
        """int64 [NUM_HEADER_FIELDS + block_steps]: the header, then each mask's digest, zero past the end."""
        summary = np.zeros(NUM_HEADER_FIELDS + self._block_steps, dtype=np.uint64)
        header = self._stage, start, self._num_steps, len(block[0].rows), block[0].num_layers
        summary[:NUM_HEADER_FIELDS] = header
        summary[NUM_HEADER_FIELDS : NUM_HEADER_FIELDS + len(block)] = [int(mask.digest, 16) for mask in block]
        return torch.from_numpy(summary.view(np.int64)).to(self._device)

    def _bits(self, block: list[SkipMask]) -> torch.Tensor:
        """uint8 [block_steps, rows, layers], zero past the end."""
        bits = torch.zeros(self._block_steps, len(block[0].rows), block[0].num_layers, dtype=torch.uint8)
        bits[: len(block)] = torch.tensor([mask.rows for mask in block], dtype=torch.uint8)
        return bits.to(self._device)

    def _gather(self, own: torch.Tensor) -> list[np.ndarray]:
        """Every rank's tensor, in the group's order."""
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(gathered, own, group=self._group)
        return [tensor.cpu().numpy() for tensor in gathered]


def explain(ranks: Sequence[int], summaries: list[np.ndarray], masks: list[np.ndarray] | None) -> str:
    """One line that names the global ``ranks`` whose summary is not the first one's, and what they would do."""
    different = [r for r, summary in enumerate(summaries) if not np.array_equal(summary, summaries[0])]
    lines = [
        f"rank {ranks[r]}: {_difference(summaries[r], summaries[0], None if masks is None else masks[r] != masks[0])}"
        for r in different[:MAX_NAMED_RANKS]
    ]
    if len(different) > MAX_NAMED_RANKS:
        lines.append(f"and {len(different) - MAX_NAMED_RANKS} more ranks")
    return (
        f"LDS skip masks differ from those of rank {ranks[0]} on {len(different)} of {len(ranks)} ranks; "
        f"{'; '.join(lines)}. Seed, LDS settings, number of steps, layout and NumPy must be the same on every rank"
    )


def _difference(own: np.ndarray, first: np.ndarray, bits: np.ndarray | None) -> str:
    """How one rank's summary differs from the first's; ``bits``: where its masks do, if all ranks' headers agree."""
    (stage, start, num_steps, rows, layers), (stage_0, start_0, num_steps_0, rows_0, layers_0) = (
        summary[:NUM_HEADER_FIELDS] for summary in (own, first)
    )
    if (stage, start) != (stage_0, start_0):
        return f"asks for stage {stage}, steps from {start}, instead of stage {stage_0}, steps from {start_0}"
    if num_steps != num_steps_0:
        return f"stage {stage} of {num_steps} steps instead of {num_steps_0}"
    if (rows, layers) != (rows_0, layers_0):
        return f"stage {stage}, {rows} masks of {layers} layers a step instead of {rows_0} of {layers_0}"
    steps = np.flatnonzero(own[NUM_HEADER_FIELDS:] != first[NUM_HEADER_FIELDS:])
    where = f"stage {stage}, step {start + steps[0]}"
    if bits is not None:
        row = np.flatnonzero(bits[steps[0]].any(axis=1))[0]
        layers_named = ", ".join(map(str, np.flatnonzero(bits[steps[0], row])))
        where += f", micro-batch {row}, layers {layers_named}" if rows > 1 else f", layers {layers_named}"
    return f"{where} ({len(steps)} of the block's steps differ)"
