"""What each decoder layer of a trained model is worth: its accuracies, and those that are left without one layer at a time.

    python tools/layer_worth.py SOURCE [--num-questions 252] [--families relation ocr] [--whole] [--out FILE.json]

SOURCE is a run's folder, a checkpoint or a weights folder. Questions are the embedded ones, asked in words where the model
sees no images. A layer is left out by emptying its two output matrices, which makes it the identity. A model that can lose a layer
for nothing says little about skipping layers. ``--whole`` asks the whole model only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_sts.config.checks import EVALUATION_FAMILIES
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.run_folder import checkpoint_of, is_of_run
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.evaluate.scenes import evaluate
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.runtime.dist import process_group

OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""The two matrices through which a layer writes to the residual stream."""
WHOLE = "whole"
Accuracies = dict[str, float]


@contextmanager
def without_layer(weights: dict[str, torch.Tensor], layer: int | None) -> Iterator[None]:
    """The layer does nothing meanwhile; None: all do what they did."""
    names = [] if layer is None else [f"language.decoder.layers.{layer}.{name}" for name in OUTPUTS]
    before = {name: weights[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            weights[name].zero_()
        try:
            yield
        finally:
            for name, tensor in before.items():
                weights[name].copy_(tensor)


def accuracies(source: Path, resolved: Resolved, layers: Sequence[int | None]) -> dict[str, Accuracies]:
    """By the layer that is left out (``whole``: none), of each family."""
    found = {}
    with process_group(resolved.config.parallel.timeout_s):
        resolved, place, chunks, gate = load_for_inference(source, resolved)
        weights = dict(named_weights(chunks))
        for layer in layers:
            with without_layer(weights, layer):
                answered = evaluate(resolved, place, chunks, gate, show_progress=False)["splits"]["eval"]
            name = WHOLE if layer is None else str(layer)
            found[name] = {family: each["accuracy"] for family, each in answered.items()}
            print(name, " ".join(f"{family} {share:.3f}" for family, share in found[name].items()), flush=True)
        groups.destroy()
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's folder, a checkpoint or a weights folder")
    parser.add_argument("--num-questions", type=int, default=252, help="a family (default: 252)")
    parser.add_argument("--families", nargs="+", choices=EVALUATION_FAMILIES, default=list(EVALUATION_FAMILIES))
    parser.add_argument("--whole", action="store_true", help="with all layers only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all accuracies as JSON")
    arguments = parser.parse_args(words)
    source = checkpoint_of(arguments.source) if is_of_run(arguments.source) else arguments.source
    sees = resolve_source(source).config.model.vision is not None
    asked = {"num_questions": arguments.num_questions, "families": arguments.families, "words": not sees}
    overrides = [f"evaluation.{key}={json.dumps(value)}" for key, value in asked.items()]
    resolved = resolve_source(source, [*overrides, "evaluation.left_out_of_mean=[]"])
    layers = [] if arguments.whole else list(range(resolved.config.model.language.num_layers))
    found = accuracies(source, resolved, [None, *layers])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table(
        "layer left out", *arguments.families, title=f"Accuracy lost, of {arguments.num_questions} questions a family"
    )
    whole = found.pop(WHOLE)
    table.add_row("none: accuracy", *(f"{share:.3f}" for share in whole.values()))
    for layer, shares in found.items():
        table.add_row(layer, *(f"{whole[family] - share:.3f}" for family, share in shares.items()))
    Console().print(table)


if __name__ == "__main__":
    main()
