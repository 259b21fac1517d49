"""A failure to know when it is met: skipped layers that do not pass the residual stream on as it is.

    python examples/study/wrong_residual.py KIND --run-dir DIR [key.path=value ...]

Trains ``healthy`` of sweeps/failures.yaml with a mistake planted in the layer. Of KIND ``twice``, a skipped layer adds its input to
itself, as if the caller had to add the residual; of ``lost``, it gives zeros, as if the caller did. No setting of megatron-sts
does that: it is what a layer of one's own may do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_sts.cli import main as megatron_sts
from megatron_sts.mcore.layer import SkippableTransformerLayer

HERE = Path(__file__).parent
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "twice": lambda hidden_states: 2 * hidden_states,
    "lost": lambda hidden_states: 0 * hidden_states,
}
HEALTHY = [
    "stages.alignment.vtc={keep_ratio: 0.5}",
    "stages.finetune.lds={alpha: 0.5, epsilon: 0.5}",
    "evaluation.num_questions=504",
]


def plant(kind: str) -> None:
    """From now on skipped layers do that."""
    right = SkippableTransformerLayer.forward

    def wrong(self: SkippableTransformerLayer, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        is_skipped = self.gate.skips(self.layer)
        output, context = right(self, hidden_states, **kwargs)
        return (KINDS[kind](hidden_states) if is_skipped else output), context

    SkippableTransformerLayer.forward = wrong  # type: ignore[method-assign]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the config")
    return parser


def main() -> int:
    args = arguments().parse_intermixed_args()
    plant(args.kind)
    return megatron_sts(["train", str(HERE / "llava.yaml"), *HEALTHY, *args.overrides, "--run-dir", str(args.run_dir)])


if __name__ == "__main__":
    sys.exit(main())
