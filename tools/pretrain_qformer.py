"""Makes the embedded tiny Q-Former with this framework: it learns from captions to show scenes to the embedded language model, which
stays as it is, as does the embedded tower. Resumable: run it again after a stop.

    python tools/pretrain_qformer.py --run-dir runs/pretrain_qformer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import batched
from pathlib import Path
from statistics import fmean

import torch
from pretrain_language import CONFIGS, train, trained_weights

from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.mcore.weights import save_weights
from megatron_sts.report.run import Run, read_run

CONFIG = CONFIGS / "qformer.yaml"
EMBEDDED = Path(__file__).parents[1] / "megatron_sts" / "model" / "tiny" / "qformer.safetensors"
LOG_EVERY = 250
"""Steps whose mean loss is told."""


def log_of(run: Run) -> Iterator[str]:
    """A line for so many steps each."""
    for lines in batched(run.steps["alignment"], LOG_EVERY):
        yield f"to step {lines[-1]['step'] + 1}: loss of captions {fmean(line['loss'] for line in lines):.3f}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="keeps checkpoints and metrics")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="safetensors file to write (bf16), a log beside it")
    arguments = parser.parse_args()
    train(CONFIG, arguments.run_dir)
    weights = trained_weights(resolve(load(CONFIG, [])), arguments.run_dir)
    mine = {name: tensor for name, tensor in weights.items() if name.startswith("qformer.")}
    save_weights(mine, arguments.out, torch.bfloat16)
    arguments.out.with_suffix(".log").write_text("".join(log_of(read_run(arguments.run_dir))))
    print(f"wrote {arguments.out}, {len(mine)} tensors", flush=True)


if __name__ == "__main__":
    main()
