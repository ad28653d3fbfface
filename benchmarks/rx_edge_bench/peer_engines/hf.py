"""transformers: the merged float32 model of the run, `generate` with embeddings, greedy.

Image to soft prompt goes through our own torch encoder: there is no other one.

Does not cover: torch.compile, other precisions, GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rx_edge.closing import Closing
from rx_edge.errors import MissingExtraError, ModelError
from rx_edge.optional import require
from rx_edge_bench.peer_engines.base import Answer, Job, Picture

if TYPE_CHECKING:
    from rx_edge.model.report_model import ReportModel

NO_RUN = "no training run was named: add --run RUN"
CACHES = {"transformers eager": None, "transformers static cache": "static"}


def is_available(job: Job) -> str | None:
    """None, or why it cannot run here."""
    try:
        for module in ("torch", "transformers", "peft"):
            require(module, extra="train")
    except MissingExtraError as error:
        return str(error)
    return None if job.run else NO_RUN


def load_merged(job: Job) -> ReportModel:
    """The run's model with the adapter folded in, float32; torch uses `job.threads` threads.

    Raises:
        ModelError: none was named, or it is not a finished run.
        UsageError: the bundle was not exported from it.
    """
    import torch

    from rx_edge.model.report_model import load_run
    from rx_edge_bench.deployment_loss import refuse_other_run

    if job.run is None:
        raise ModelError(NO_RUN)
    model = load_run(job.run)
    refuse_other_run(model, job.bundle)
    torch.set_num_threads(job.threads)
    model.lm = model.lm.merge_and_unload()
    return model.eval()


class Transformers(Closing):
    """`generate` over one model, which several of these may share."""

    def __init__(self, load: Callable[[], ReportModel], job: Job, cache: str | None) -> None:
        """`load`: gives a `load_merged`; `cache`: `cache_implementation`, None = one that grows."""
        from transformers import GenerationConfig

        model = load()
        self._model: Any = model
        self._image = job.bundle.manifest.image
        self._config = GenerationConfig(
            do_sample=False,
            max_new_tokens=job.limit,
            eos_token_id=job.end,
            pad_token_id=job.end,
            cache_implementation=cache,
        )
        self._end = job.end
        self.weights = "torch float32, merged"
        self.settings: dict[str, Any] = {
            "cache": cache or "dynamic",
            "attention": str(model.lm.config._attn_implementation),
            "threads": job.threads,
        }

    def draft(self, picture: Picture) -> Answer:
        """The study itself, not the prepared square."""
        import torch
        from transformers import LogitsProcessorList

        from rx_edge import image
        from rx_edge.radiograph import open_radiograph

        dictated = () if picture.report is None else (_dictation(picture.report, self._end),)
        started = time.perf_counter()
        pixels = image.prepare(open_radiograph(picture.study), self._image)
        with torch.inference_mode():
            soft = self._model.encoder(torch.from_numpy(pixels))[0]
            rows = self._model.prompt_embeddings(soft)[None]
            found = self._model.lm.generate(
                inputs_embeds=rows,
                attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
                generation_config=self._config,
                logits_processor=LogitsProcessorList(dictated),
            )
        ids = tuple(int(token) for token in found[0] if int(token) != self._end)
        text = self._model.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
        return Answer(ids, text, time.perf_counter() - started)

    def close(self) -> None:
        """Drop the model."""
        self._model = None


def _dictation(report: Sequence[int], end: int) -> Callable[[Any, Any], Any]:
    """A logits processor: the next token of `report` wins, then the end."""
    script = iter((*report, end))

    def dictate(_: Any, scores: Any) -> Any:
        scores[:, next(script)] = float("inf")
        return scores

    return dictate
