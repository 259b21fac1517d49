"""Weights & Biases beside metrics.jsonl. Rank 0 only; what it cannot do is told and costs no run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sts.config.logs import WandbConfig

RUN_ID = "wandb_id"
"""In RUN_DIR: under which id a run goes on there."""
INIT_TIMEOUT_S = 60.0
"""A server that does not answer by then is done without."""
FINISH_TIMEOUT_S = 60.0
"""What is not sent by then stays in RUN_DIR/wandb: the other ranks wait for this one to end."""


class WandbBoard:
    """One run's page. Steps count for each stage from 0, as in metrics.jsonl."""

    def __init__(
        self, settings: WandbConfig, run_dir: Path, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        """Starts or goes on with the page; without a server or a key there, ``warn`` says so and nothing else happens."""
        import wandb

        self._warn, self._mode = warn, settings.mode
        self._run: wandb.Run | None = None
        self._stages: set[str] = set()
        run_id = run_dir / RUN_ID
        with self._losing():
            if not run_id.is_file():
                run_id.write_text(secrets.token_hex(4), encoding="utf-8")
            wandb.setup(wandb.Settings(silent=True))  # at a terminal it would ask for a key, and wait
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or run_dir.name,
                group=settings.group,
                tags=list(settings.tags),
                mode=settings.mode,
                dir=str(run_dir),
                id=run_id.read_text(encoding="utf-8"),
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S
                ),
            )

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """A step's numbers."""
        if self._run is None:
            return
        with self._losing():
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """Waits until all is sent or, offline, written, but not for ever."""
        if self._run is not None:
            with self._losing():
                self._run.finish()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Numbers on a page are not worth a run, whatever its library raises: its process may be gone, or the disk full."""
        try:
            yield
        except Exception as error:
            self._run = None
            told = " ".join(str(error).split()) or type(error).__name__
            way = " (logging.wandb.mode=offline writes it here)" if self._mode == "online" else ""
            self._warn(f"Weights & Biases: {told}; training goes on without it{way}")
