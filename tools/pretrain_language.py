"""Makes the embedded tiny language model with this framework, from text only. Resumable: run it again after a stop.

Six layers are trained first, from heads that already look back and count (``pretrain/start.py``), then grown to twelve, each layer
becoming two that add half as much, then trained on with random layer skipping (LDS), so that the network lives with
skipped layers. In the last stages a scene is also given as a map of 64 words, one a patch, the layout of projected visual
tokens. At the end all questions are asked again without each layer in turn, which tells what each is worth.

    python tools/pretrain_language.py --run-dir runs/pretrain_language
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from pretrain.start import OUTPUTS, starting_weights
from safetensors.torch import load_file

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import checkpoint, groups
from megatron_sts.mcore.weights import named_weights, save_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group

CONFIGS = Path(__file__).parent / "pretrain"
WORTH = Path(__file__).parent / "layer_worth.py"
EMBEDDED = Path(__file__).parents[1] / "megatron_sts" / "model" / "tiny" / "language.safetensors"


def grow(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Twice the layers, nearly the same function: layer i becomes layers 2i and 2i + 1, each adding half of what it added.

    Copies that begin by adding nothing (LLaMA Pro) would keep the function, but a network with such layers can skip half of
    them for nothing.
    """
    grown: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith("language.decoder.layers."):
            grown[name] = tensor
            continue
        *prefix, layer, rest = name.split(".", 4)
        for copy in (0, 1):
            grown[".".join([*prefix, str(2 * int(layer) + copy), rest])] = (
                tensor / 2 if rest in OUTPUTS else tensor.clone()
            )
    return grown


def train(config: Path, run_dir: Path, *overrides: str) -> None:
    """Runs (or goes on with) one training run."""
    command = [sys.executable, "-m", "megatron_sts", "train", str(config), *overrides, "--run-dir", str(run_dir)]
    subprocess.run(command, check=True)


def trained_weights(resolved: Resolved, run_dir: Path) -> dict[str, torch.Tensor]:
    """The whole weights of a finished run's last checkpoint."""
    newest = max((run_dir / "checkpoints").glob(f"{len(resolved.stages) - 1}-*"))
    with process_group(60):
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        chunks = build_model(resolved, SkipGate())
        checkpoint.load_model(newest / "state", chunks)
        groups.destroy()
    return {name: parameter.detach().clone() for name, parameter in named_weights(chunks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="keeps checkpoints and logs of both runs")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="safetensors file to write (bf16)")
    arguments = parser.parse_args()

    small = resolve(load(CONFIGS / "language_6.yaml", []))
    start = arguments.run_dir / "start.safetensors"
    if not start.exists():
        save_weights(starting_weights(small.config.model.language, small.config.seed), start, torch.float32)
    train(CONFIGS / "language_6.yaml", arguments.run_dir / "six", f"model.language.init={start}")

    grown = arguments.run_dir / "grown.safetensors"
    if not grown.exists():
        save_weights(grow(trained_weights(small, arguments.run_dir / "six")), grown, torch.float32)
    train(CONFIGS / "language_12.yaml", arguments.run_dir / "twelve", f"model.language.init={grown}")

    large = resolve(load(CONFIGS / "language_12.yaml", []))
    save_weights(trained_weights(large, arguments.run_dir / "twelve"), arguments.out, torch.bfloat16)
    print(f"wrote {arguments.out}, {len(load_file(arguments.out))} tensors", flush=True)
    worth = [
        sys.executable,
        str(WORTH),
        str(arguments.run_dir / "twelve"),
        "--out",
        str(arguments.run_dir / "layers.json"),
    ]
    subprocess.run(worth, check=True)


if __name__ == "__main__":
    main()
