"""What the samplers of visual tokens keep of embedded scenes, by a trained model's eyes, as one picture for ``report``."""

from __future__ import annotations

from matplotlib.figure import Figure

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.run_folder import checkpoint_of
from megatron_sts.evaluate.kept import kept_of_images, not_on_a_grid
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.evaluate.scenes import draw_questions, record_of
from megatron_sts.mcore import groups
from megatron_sts.report.kept_figure import KeptTokens, kept_figure
from megatron_sts.report.run import Run
from megatron_sts.runtime.dist import process_group

FAMILIES = ("ocr", "relation", "existence", "counting")
"""What the pictures are asked, in turn."""
KEEP_RATIO = 0.5


def draw_kept(run: Run, num_images: int) -> Figure:
    """At the keep ratio of the run's last stage with VTC, or half of the tokens; on this process.

    Raises:
        ConfigError: the run has no checkpoint, or no visual tokens that are patches.
    """
    checkpoint = checkpoint_of(run.folder)
    resolved = resolve_source(checkpoint, [f"evaluation.num_questions={num_images}"])
    if (why := not_on_a_grid(resolved)) is not None:
        raise ConfigError(f"{run.folder}: {why}")
    ratio = keep_ratio_of(run)
    questions = [
        draw_questions(resolved.config.evaluation, "eval", FAMILIES[number % len(FAMILIES)])[number // len(FAMILIES)]
        for number in range(num_images)
    ]
    with process_group(resolved.config.parallel.timeout_s):
        _, _, chunks, gate = load_for_inference(checkpoint, resolved)
        found = kept_of_images(resolved, chunks, gate, [record_of(question, False) for question in questions], ratio)
        groups.destroy()
    pictures = [
        KeptTokens(
            kept.pixels.permute(1, 2, 0).numpy(), question.question, kept.tokens, resolved.stages[-1].visual_tokens_in
        )
        for question, kept in zip(questions, found, strict=True)
    ]
    return kept_figure(
        pictures, f"{run.folder.name}: kept at a ratio of {ratio:g} (pooled: the centres of averaged areas)"
    )


def keep_ratio_of(run: Run) -> float:
    """Of the last stage with VTC, at its start; else half."""
    ratios = [float(stage["vtc"]["keep_ratio"]) for stage in run.config["stages"] if stage["vtc"] is not None]
    return ratios[-1] if ratios else KEEP_RATIO
