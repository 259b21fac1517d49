"""Makes the embedded tiny vision tower with this framework, from scenes alone. Resumable: run it again after a stop.

The tower learns to say, patch by patch, what lies there, in two ways: the features of the patch that holds an item's centre learn to
point to a direction that stands for the item's word (so they describe the whole item), as CLIP's do to those of a text encoder;
and a linear head, thrown away afterwards, names what covers a patch. Only sprites of the train pool and handwriting of the train split are shown.

    python tools/pretrain_vision.py --run-dir runs/pretrain_vision
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.scenes.catalog import load_catalog
from megatron_sts.data.scenes.patches import num_patch_classes, patch_labels
from megatron_sts.data.scenes.render import DigitSplit, Style, render
from megatron_sts.data.scenes.scene import draw_crowded_scene, draw_scene, load_pool
from megatron_sts.data.scenes.words import DIGITS
from megatron_sts.data.template import load_tokenizer
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import save_weights
from megatron_sts.runtime.dist import process_group
from megatron_sts.vision.tower import VisionTower

TINY = Path(__file__).parents[1] / "megatron_sts" / "model" / "tiny"
EMBEDDED, LANGUAGE = TINY / "vision.safetensors", TINY / "language.safetensors"
VISION = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "feature_layer": -1,
}
SEED = 11
BATCH = 48
"""Images a step."""
CROWDED = 0.75
"""Share of batches whose scenes are crowded; the others look like the scenes of the training source."""
BENT_FROM = 1500
"""Step from which handwriting is also shown bent: by then its 1,400 samples are known far better than new ones."""
LR, WARMUP_STEPS, WEIGHT_DECAY, BETAS, CLIP_GRAD = 1.5e-3, 100, 0.02, (0.9, 0.98), 1.0
LOGIT_SCALE = 10.0
"""Of cosines. So small that a patch must point almost where its word does: a projector can then turn patches into words by a matrix."""
LENGTH_WEIGHT = 0.1
"""Of the term for features of one root mean square, which cosines leave open."""
BACKGROUND_WEIGHT = 0.3
"""Of class 0, which fills most patches."""
COVERAGE_WEIGHT = 0.2
"""Of the loss of what covers a patch."""
SAVE_EVERY, LOG_EVERY = 250, 50
"""Steps."""
EVAL_BATCHES = 10
RESIDUAL_WRITERS = (".ln_pre.", ".linear_proj.", ".linear_fc2.")
"""Parts of the names of the weights whose outputs make up the residual stream."""


@dataclass(frozen=True)
class PatchBatch:
    """Images and what lies at each patch."""

    pixels: torch.Tensor
    """uint8 [n, 3, h, w]."""
    centre: torch.Tensor
    """int64 [n, patches]: the item whose centre the patch holds."""
    coverage: torch.Tensor
    """int64 [n, patches]: the item that covers the patch's centre."""


class PatchClassifier(torch.nn.Module):
    """The tower, the words that it learns to point to, and a head that says what covers a patch."""

    class_weight: torch.Tensor
    words: torch.Tensor

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        self.tower = VisionTower(resolved)
        hidden = self.tower.encoder.visual_hidden_size
        self.register_buffer("words", word_vectors(hidden), persistent=False)
        self.coverage = torch.nn.Linear(hidden, num_patch_classes())
        weight = torch.ones(num_patch_classes())
        weight[0] = BACKGROUND_WEIGHT
        self.register_buffer("class_weight", weight, persistent=False)

    def centre(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of the item whose centre a patch holds, ``[..., classes]``: by the angle to each word's direction, as CLIP's."""
        return LOGIT_SCALE * F.normalize(features, dim=-1) @ self.words.T

    def loss(self, batch: PatchBatch) -> torch.Tensor:
        """Weighted cross-entropy over patches, and what keeps all features about equally long; a scalar."""
        features = self.tower(batch.pixels).flatten(0, 1)
        centre = F.cross_entropy(self.centre(features), batch.centre.flatten(), self.class_weight)
        coverage = F.cross_entropy(self.coverage(features), batch.coverage.flatten(), self.class_weight)
        length = (features.square().mean(-1).sqrt() - 1).square().mean()
        return centre + COVERAGE_WEIGHT * coverage + LENGTH_WEIGHT * length


def word_vectors(hidden: int) -> torch.Tensor:
    """The direction that stands for each class of patches, of unit length: [classes, hidden].

    It is that of the class's word in the embedded language model, without what all words share, and all of them turned by one
    random rotation. So the tower sees likeness as a language model does, as CLIP's learns it from a text encoder, but in
    directions of its own, which a projector still has to find.
    """
    weights = load_file(LANGUAGE)["language.embedding.word_embeddings.weight"].float()
    encode = load_tokenizer("scenes", "chat").encode
    words = weights[
        torch.tensor([encode(word) for word in (".", *load_catalog().names, *DIGITS)]).squeeze(1)
    ]  # a token each
    rotation, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(SEED)))
    return F.normalize(words - words.mean(0), dim=1) @ rotation


def vision_run() -> Resolved:
    """A run whose vision tower is the tiny one; its language model and its stage are placeholders."""
    language = {
        "num_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 1024,
    }
    batch = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "sequence_length": 128}
    stage = {"name": "patches", "steps": 1, "optimizer": {"lr": LR}, "batch": batch}
    model = {"vision": VISION, "language": language}
    return resolve(RunConfig.model_validate({"seed": SEED, "model": model, "stages": [stage]}))


def start(model: PatchClassifier) -> None:
    """Starting weights: matrices by fan-in, faint positions and class token, so that the pixels are heard from the start."""
    encoder = model.tower.encoder
    with torch.no_grad():
        for matrix in (parameter for parameter in encoder.decoder.parameters() if parameter.dim() == 2):
            matrix.normal_(std=(3 * matrix.shape[1]) ** -0.5)
        encoder.position_embeddings.weight.mul_(0.1)
        encoder.class_token.mul_(0.1)


def draw_batch(rng: random.Random, num_images: int, crowded: bool, style: Style, digits: DigitSplit) -> PatchBatch:
    """Scenes of the train pool, painted and labelled."""
    draw = draw_crowded_scene if crowded else draw_scene
    scenes = [draw(rng, load_pool("train")) for _ in range(num_images)]
    images = np.stack([render(scene, style, digits) for scene in scenes]).transpose(0, 3, 1, 2)
    centre, coverage = (np.stack(labels) for labels in zip(*map(patch_labels, scenes), strict=True))
    return PatchBatch(torch.from_numpy(images.copy()), torch.from_numpy(centre), torch.from_numpy(coverage))


def train_batch(step: int) -> PatchBatch:
    """The batch of a step, a pure function of its number."""
    rng = random.Random(f"{SEED}/train/{step}")
    digits: DigitSplit = "train_bent" if step >= BENT_FROM else "train"
    return draw_batch(rng, BATCH, rng.random() < CROWDED, "google", digits)


@torch.no_grad()
def evaluate(model: PatchClassifier, style: Style) -> str:
    """Accuracy at the patches that hold the centre of an object or a digit, in ordinary scenes with unseen handwriting."""
    rng = random.Random(f"{SEED}/eval")
    predicted, wanted = [], []
    for _ in range(EVAL_BATCHES):
        batch = draw_batch(rng, BATCH, False, style, "test")
        predicted.append(model.centre(model.tower(batch.pixels)).argmax(-1))
        wanted.append(batch.centre)
    got, want = torch.cat(predicted), torch.cat(wanted)
    is_digit = want > len(load_catalog())
    is_object = (want > 0) & ~is_digit
    accuracy = {
        name: (got == want)[where].float().mean() for name, where in (("objects", is_object), ("digits", is_digit))
    }
    return ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()) + (
        f", false alarms {(got > 0)[want == 0].float().mean():.4f}"
    )


@torch.no_grad()
def exported_weights(tower: VisionTower) -> dict[str, torch.Tensor]:
    """The tower's weights under their layout-free names, scaled so that its features have a standard deviation of one.

    The layers read the residual stream through LayerNorms: what writes to it can be scaled without another effect.
    """
    features = tower(draw_batch(random.Random(f"{SEED}/scale"), BATCH, False, "google", "train").pixels)
    weights = {}
    for name, parameter in tower.named_parameters():
        writes = any(part in name for part in RESIDUAL_WRITERS)
        weights[f"vision.{name}"] = parameter / features.std() if writes else parameter
    return weights


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, then a straight line to zero."""
    return LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / num_steps)


class Run:
    """One training run, its state file and its log."""

    def __init__(self, run_dir: Path, num_steps: int, out: Path) -> None:
        self.state_path, self.num_steps, self.out = run_dir / "state.pt", num_steps, out
        torch.manual_seed(SEED)
        self.model = PatchClassifier(vision_run())
        start(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.log: list[str] = []
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        shapes, kept = (
            {name: value.shape for name, value in found.items() if isinstance(value, torch.Tensor)}
            for found in (self.model.state_dict(), state["model"])
        )
        if shapes != kept:
            sys.exit(
                f"{self.state_path}: is of another model, of an earlier version of this tool; give a new --run-dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def note(self, line: str) -> None:
        """Prints a line and keeps it for the log that ships with the weights."""
        self.log.append(f"step {self.step}, {self.seconds:.0f} s: {line}")
        print(self.log[-1], flush=True)

    def save(self) -> None:
        """State, weights so far and log; each file is replaced as a whole."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.state_path.with_suffix(".part")
        torch.save({**state, "step": self.step, "seconds": self.seconds, "log": self.log}, partial)
        os.replace(partial, self.state_path)
        partial = self.out.with_suffix(".part")
        save_weights(exported_weights(self.model.tower), partial, torch.bfloat16)
        os.replace(partial, self.out)
        self.out.with_suffix(".log").write_text("\n".join(self.log) + "\n")

    def fit(self) -> None:
        """Goes on to the last step; a finished run writes its weights again."""
        while self.step < self.num_steps:
            began = time.perf_counter()
            loss = self._train_step()
            self.seconds += time.perf_counter() - began
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.note(f"loss {loss.item():.3f}")
            if self.step % SAVE_EVERY == 0 or self.step == self.num_steps:
                for style in get_args(Style):
                    self.note(f"{style} style: {evaluate(self.model, style)}")
                self.save()
        self.save()

    def _train_step(self) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.num_steps)
        loss = self.model.loss(train_batch(self.step))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_GRAD)
        self.optimizer.step()
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="keeps the state to go on from")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="safetensors file to write (bf16), a log beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    with process_group(60):
        resolved = vision_run()
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        Run(arguments.run_dir, arguments.steps, arguments.out).fit()
        groups.destroy()


if __name__ == "__main__":
    main()
