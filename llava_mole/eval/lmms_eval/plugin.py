"""This package's models inside lmms-eval: `lmms_eval --model llava_mole --model_args pretrained=RUN --tasks ...`.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models` and imports this module; nothing else in the
package does. A task's prompt becomes the user's turn in the checkpoint's own template; its images go where the text has
placeholders, or in front of it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava_mole.common.errors import ConfigError, DataError, PromptError
from llava_mole.common.log import get_logger
from llava_mole.inference.decoding import Decoding
from llava_mole.inference.predictor import Predictor

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

logger = get_logger(__name__)

WINDOW = 2
"""Batches whose images are in memory together, and which are sorted by length together."""
_DEFAULT_NEW_TOKENS = 128


def manifest() -> "ModelManifest":
    """Return what lmms-eval asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_mole", simple_class_path=f"{__name__}.LlavaMoleModel")


class LlavaMoleModel(lmms):
    """A run or checkpoint directory as an lmms-eval model.

    Args:
        pretrained: Run or checkpoint directory.
        model_base: Language model, if it has moved since training.
        vision_tower: Vision tower, likewise.
        template: Replaces the template stored in the checkpoint.
        device, dtype, quantization: As `Predictor.from_pretrained` takes them.
        batch_size: Prompts per forward pass.

    Raises:
        ConfigError: an unknown argument in `--model_args`, or a value that is not allowed.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        vision_tower: str | None = None,
        template: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        quantization: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"--model_args {', '.join(unknown)}: unknown; allowed are pretrained, model_base, vision_tower, "
                "template, device, dtype, quantization and batch_size"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(
                f"batch_size is {batch_size!r}; it must be a number of at least 1 (lmms-eval's 'auto' is not offered)"
            )
        if torch.cuda.is_available():  # under `accelerate launch`, each rank has its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        kind = "auto" if device is None else "cuda" if str(device).startswith("cuda") else str(device)
        self._predictor = Predictor.from_pretrained(
            pretrained,
            model_base=model_base,
            vision_tower=vision_tower,
            template=template,
            device=kind,
            dtype=dtype,
            quantization=quantization,
        )
        self._batch_size = int(batch_size)
        self.device = self._predictor.loaded.model.device

    @property
    def batch_size(self) -> int:
        """Prompts per forward pass."""
        return self._batch_size

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Answer (context, gen_kwargs, doc_to_visual, doc_id, task, split) requests, in their order."""
        answers: list[str] = [""] * len(requests)
        for members in self._windows(requests, lambda request: repr(sorted(request.args[1].items()))):
            options, stop = decoding_options(requests[members[0]].args[1])
            prompts = [requests[n].args[0] for n in members]
            images = [self._images(requests[n].args[2:]) for n in members]
            with _errors_named_after([requests[n] for n in members]):
                texts = self._predictor.generate(images, prompts, stop=stop, batch_size=self._batch_size, **options)
            for n, text in zip(members, texts, strict=True):
                answers[n] = text
                self.cache_hook.add_partial("generate_until", requests[n].args[:2], text)
        return answers

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        """Score (context, doc_to_target, doc_to_visual, doc_id, task, split) requests: (log probability, is greedy)."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members in self._windows(requests, lambda request: ""):
            prompts, continuations, images = [], [], []
            for n in members:
                context, target, *rest = requests[n].args
                prompts.append(context)
                continuations.append(target if isinstance(target, str) else target(self._document(rest[1:])))
                images.append(self._images(rest))
            with _errors_named_after([requests[n] for n in members]):
                found = self._predictor.score(images, prompts, continuations, batch_size=self._batch_size)
            for n, likelihood in zip(members, found, strict=True):
                results[n] = (likelihood.logprob, likelihood.is_greedy)
        return results

    def generate_until_multi_round(self, requests: "Sequence[Instance]") -> list[str]:
        """Refuse: LLaVA-1.5 is trained on conversations whose images are given at the start."""
        raise NotImplementedError("llava_mole does not run lmms-eval's multi-round tasks; choose another task")

    def _windows(self, requests: "Sequence[Instance]", group: Any) -> Iterator[list[int]]:
        """Yield the positions of requests of equal `group`, `WINDOW` batches at a time, with a progress bar."""
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(group(request), []).append(n)
        size = WINDOW * self._batch_size
        with tqdm(total=len(requests), desc="llava_mole", unit="q", disable=True if self.rank else None) as progress:
            for members in groups.values():
                for start in range(0, len(members), size):
                    window = members[start : start + size]
                    yield window
                    progress.update(len(window))

    def _images(self, rest: Sequence[Any]) -> list[Any]:
        """Return the images of a request, given its (doc_to_visual, doc_id, task, split)."""
        doc_to_visual, *place = rest
        return list(doc_to_visual(self._document(place)) or []) if doc_to_visual is not None else []

    def _document(self, place: Sequence[Any]) -> Any:
        doc_id, task, split = place
        return self.task_dict[task][split][doc_id]


@contextmanager
def _errors_named_after(requests: "Sequence[Instance]") -> Iterator[None]:
    """Turn an error about the n-th prompt into one about the document of the n-th request."""
    try:
        yield
    except PromptError as error:
        doc_id, task, split = requests[error.position].args[-3:]
        raise DataError(f"task {task}, split {split}, document {doc_id}: {error.problem}") from None


def decoding_options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return lmms-eval's generation arguments as `Predictor.generate` takes them, and the texts that end an answer.

    `do_sample: false` is greedy whatever the temperature. Arguments that are not supported are named in the log.

    Raises:
        ConfigError: a value outside its range.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    sample = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", None) or 0.0)
    decoding = Decoding(
        max_new_tokens=int(rest.pop("max_new_tokens", None) or _DEFAULT_NEW_TOKENS),
        temperature=0.0 if sample is False else temperature,
        top_p=rest.pop("top_p", None) or None,
        num_beams=int(rest.pop("num_beams", None) or 1),
    )
    if rest:
        logger.warning("generation arguments that are not supported are ignored: %s", ", ".join(sorted(rest)))
    options = {name: getattr(decoding, name) for name in ("max_new_tokens", "temperature", "top_p", "num_beams")}
    return options, [until] if isinstance(until, str) else [text for text in until if text]
