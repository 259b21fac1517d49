"""The picture of executed layers that training leaves in TensorBoard, read back from its event files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sts.report.figures import as_pixels, utilisation_figure
from megatron_sts.report.run import read_run
from megatron_sts.report.utilisation import utilisation
from tests.train import stagehand
from tests.train.stagehand import act, events, lines, scene

pytestmark = [pytest.mark.slow, pytest.mark.timeout(stagehand.TIMEOUT_S + 30)]


def test_a_stage_with_lds_leaves_its_picture(tmp_path: Path) -> None:
    """Two pipeline ranks, stopped within the stage and started again: the last picture is of the whole stage."""
    run_dir = tmp_path / "run"
    written = stagehand.config(parallel=stagehand.LAYOUTS["PP=2"], logging={"tensorboard": True})
    assert act(2, scene(run_dir, written, stop=[1, 1]), scene(run_dir, written)) == [[0, 0], [0, 0]]
    assert [event["step"] for event in events(run_dir, "stop")] == [2]
    assert len(list((run_dir / "tensorboard").iterdir())) == 2  # one a start: rank 1 writes none
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["finetune/utilisation"]
    stopped, last = board.Images("finetune/utilisation")
    assert (stopped.step, last.step) == (1, 3)

    figure = utilisation_figure(utilisation(read_run(run_dir)))
    pixels = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)).convert("RGB"))
    np.testing.assert_array_equal(pixels, as_pixels(figure))
    layers, ranks = figure.axes
    runs = [line["layer_runs"] for line in lines(run_dir) if line.get("stage") == "finetune" and "layer_runs" in line]
    executed = np.sum(runs, axis=0) / (4 * 4)  # steps x micro-batches
    assert len(runs) == 4 and 0 < executed.mean() < 1
    np.testing.assert_allclose([bar.get_height() for bar in layers.patches], executed)
    np.testing.assert_allclose([bar.get_height() for bar in ranks.patches], executed.reshape(2, 2).mean(axis=1))
    planned = events(run_dir, "skipping")[-1]["executed_planned"]
    np.testing.assert_allclose(layers.lines[0].get_ydata(), planned)
    np.testing.assert_allclose(ranks.lines[0].get_ydata(), np.reshape(planned, (2, 2)).mean(axis=1))
