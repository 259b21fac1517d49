"""lmms-eval's model ``megatron_sts``: its benchmarks, asked of our checkpoints. Needs the extra ``eval``.

``python -m lmms_eval --model megatron_sts --model_args checkpoint=RUN_DIR --tasks gqa`` finds it by the entry point
``lmms_eval.models``, and takes config values by path as further ``model_args``. The interface is lmms-eval 0.7's
(``lmms_eval/api/model.py``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from rich.progress import Progress
from torch import distributed as dist

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.run_folder import checkpoint_of
from megatron_sts.convert.folder import is_weights_folder
from megatron_sts.data.image import decode_opened
from megatron_sts.data.records import IMAGE_MARKER, Record, Turn
from megatron_sts.evaluate.generate import Generator, Request, Sampling
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.evaluate.together import Together, ending_on_error
from megatron_sts.launch import trail
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import is_rank_zero, max_over_ranks, on_rank_zero, process_group
from megatron_sts.runtime.progress_lines import ProgressLines

MANIFEST = ModelManifest("megatron_sts", simple_class_path="megatron_sts.evaluate.lmms.MegatronSts")
DEFAULT_MAX_NEW_TOKENS = 1024
"""Where a task sets none, as lmms-eval's adapter for LLaVA has it."""
BATCHES_AT_ONCE = 8


class MegatronSts(lmms):
    """A checkpoint as lmms-eval asks it.

    lmms-eval gives each rank other requests; tensor- and pipeline-parallel ranks answer together. So ranks
    share their requests, answer all of them as one, and each hands back the answers to its own, which lmms-eval gathers on rank
    0. They may have unequally many; ranks with few send empty parts. On several ranks an error ends its rank, see ``Together``.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: object,
    ) -> None:
        """``checkpoint`` and ``overrides`` are those of ``megatron-sts eval``; ``batch_size`` is of a data-parallel rank.

        ``device`` and ``max_batch_size`` are what lmms-eval always hands over; a rank's device is its own choice.
        """
        super().__init__()
        num_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        words = [f"{path}={value}" for path, value in overrides.items()]
        words.append(f"evaluation.micro_batch_size={batch_size}")
        with ending_on_error(num_ranks):
            check_no_cache(sys.argv, num_ranks)
            resolved = resolve_source(Path(checkpoint), words, num_ranks)
            self._joined = ExitStack()  # until the process ends
            if not dist.is_initialized():
                self._joined.enter_context(process_group(resolved.config.parallel.timeout_s))
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._together = Together(Path(checkpoint), resolved.config.parallel.timeout_s)
        self._num_at_once = BATCHES_AT_ONCE * resolved.config.evaluation.micro_batch_size
        with self._together.block():
            source = on_rank_zero(partial(newest_of, Path(checkpoint)))
            self._generator = Generator(*load_for_inference(source, resolved))
        self._num_asked = 0

    @property
    def device(self) -> torch.device:
        """Where lmms-eval counts requests over ranks."""
        return current_device().torch_device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to this rank's requests; a collective."""
        texts: list[str] = []
        with self._together.block():
            [most] = max_over_ranks([float(len(requests))])
            with Progress(disable=not is_rank_zero()) as bar:
                lines = ProgressLines(bar, "requests of a rank", int(most))
                for start in bar.track(range(0, int(most), self._num_at_once), description="megatron_sts"):
                    trail.enter("evaluation")
                    texts += self._answer(requests[start : start + self._num_at_once])
                    lines.tell(min(start + self._num_at_once, int(most)))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refused: tasks that rank given answers by likelihood."""
        refuse("--tasks", names_of(requests), "ranks answers by their likelihood", "choose tasks of generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Refused: tasks that go on asking after an answer."""
        refuse("--tasks", names_of(requests), "asks in several rounds", "choose tasks of generate_until")

    def _asked(
        self, context: str, settings: Mapping[str, Any], doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> tuple[Request, Sampling]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        record = record_of(f"{task}/{split}/{doc_id}", context, visuals)
        until = settings.get("until") or ()
        request = Request(
            record,
            max_new_tokens=int(settings.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)),
            stop=(until,) if isinstance(until, str) else tuple(word for word in until if word),
        )
        return request, sampling_of(settings)

    def _answer(self, instances: Sequence[Instance]) -> list[str]:
        """Answers of this rank's part, which may be empty; a collective.

        Parts are put together in turn, as lmms-eval dealt them out: draws are those of one rank, until it pads a part.
        """
        parts = [[(rank, asked) for asked in part] for rank, part in enumerate(self._all_parts(instances))]
        everything = [dealt for turn in zip_longest(*parts) for dealt in turn if dealt is not None]
        texts: dict[int, str] = {}
        for sampling in dict.fromkeys(sampling for _, (_, sampling) in everything):
            places = [place for place, (_, (_, wanted)) in enumerate(everything) if wanted == sampling]
            numbered = replace(sampling, first_number=self._num_asked)
            said = self._generator.generate([everything[place][1][0] for place in places], numbered)
            self._num_asked += len(places)
            texts |= zip(places, said, strict=True)
        return [texts[place] for place, (rank, _) in enumerate(everything) if rank == dist.get_rank()]

    def _all_parts(self, instances: Sequence[Instance]) -> list[list[tuple[Request, Sampling]]]:
        """What each rank asks; a collective, because none may go on where another cannot.

        Raises:
            ConfigError: on every rank, one of them cannot make requests of its instances.
        """
        asked: list[tuple[Request, Sampling]] = []
        reason = None
        try:
            asked = [self._asked(*instance.args) for instance in instances]
        except Exception as error:  # a task's own code raises anything
            reason = f"{type(error).__name__}: {error}"
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (asked, reason))
        for rank, (_, found) in enumerate(parts):
            if found is not None:
                raise ConfigError(f"rank {rank} cannot make requests of its task ({found}); choose another --tasks")
        return [part for part, _ in parts]


def newest_of(source: Path) -> Path:
    """A folder of weights, or a checkpoint. One rank says which: a run that trains on may give others a newer one."""
    return source if is_weights_folder(source) else checkpoint_of(source)


def names_of(requests: Sequence[Instance]) -> str:
    """The tasks that requests are of; none where lmms-eval gave this rank no request."""
    return ",".join(sorted({request.task_name for request in requests}))


def check_no_cache(argv: Sequence[str], num_ranks: int) -> None:
    """Refuses lmms-eval's response cache on several ranks: one that finds all its answers there asks us nothing."""
    if num_ranks > 1 and any(word.split("=")[0] == "--use_cache" for word in argv):
        refuse("--use_cache", f"on {num_ranks} ranks", "a rank with all answers cached leaves the others waiting",
               "leave it out, or ask on one rank")  # fmt: skip


def record_of(key: str, context: str, visuals: Sequence[object]) -> Record:
    """A conversation of one turn; images that ``context`` has no marker for come first, as in lmms-eval's LLaVA.

    Raises:
        ConfigError: a visual is no picture.
        BadSampleError: it is one that is not used.
    """
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            refuse("--tasks", key, f"shows the model a {type(visual).__name__}", "choose tasks of pictures and text")
    num_unmarked = len(visuals) - context.count(IMAGE_MARKER)
    text = f"{' '.join([IMAGE_MARKER] * num_unmarked)}\n{context}" if num_unmarked > 0 else context
    pictures = [decode_opened(visual, key) for visual in visuals if isinstance(visual, Image.Image)]
    return Record(key, (Turn("user", text),), tuple(partial(np.asarray, picture) for picture in pictures))


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Greedy unless a task sets a temperature above 0."""
    temperature = float(settings.get("temperature") or 0)
    return Sampling(temperature=temperature, top_p=float(settings.get("top_p") or 1.0)) if temperature else Sampling()
