"""Functions that the lmms-eval tasks of this folder call; questions and metrics are those of `configs/benchmarks/`.

lmms-eval loads this file by its path and demands its name; everything it uses comes from the installed package.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from PIL.Image import Image

from llava_mole.data.images import load_image
from llava_mole.eval.benchmarks.benchmark import BenchmarkQuestions, load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.eval.metrics.table import METRICS

Document = Mapping[str, Any]


@cache
def _benchmark(name: str) -> BenchmarkQuestions:
    return load_questions(get_benchmark(name))


@cache
def _group_of(name: str) -> dict[str, str]:
    """Return the group of each question id."""
    return {question.key: question.group for question in _benchmark(name).questions}


def _images(name: str, doc: Document) -> list[Image]:
    given = doc.get("image")
    names = given if isinstance(given, list) else [] if given is None else [given]
    return [load_image(image, _benchmark(name).image_folder) for image in names]


def _hits(name: str, doc: Document, results: Sequence[str], number: dict[str, str]) -> dict[str, Any]:
    """Return the value of the field `number[group]` ("metric.field") for the answer, by group."""
    group = _group_of(name)[str(doc["question_id"])]
    metric, _, field = number[group].partition(".")
    # The loader of `datasets` fills keys that only other rows have with None.
    scored = METRICS[metric].score(results[0], {key: value for key, value in doc.items() if value is not None})
    return {} if scored is None else {group: scored[field]}


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return the question between the task's prompts."""
    prompts = lmms_eval_specific_kwargs or {}
    return f"{prompts.get('pre_prompt', '')}{doc['text']}{prompts.get('post_prompt', '')}"


def path_vqa_visual(doc: Document) -> list[Image]:
    """Return the image of a PathVQA question."""
    return _images("pathvqa", doc)


def path_vqa_results(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Return `open` (normalised exact match) or `closed` (LLaVA-Med's rule), 0 or 1."""
    return _hits("pathvqa", doc, results, {"open": "path_vqa_open.exact", "closed": "path_vqa_closed.llava_med"})


def tiny_ehub_visual(doc: Document) -> list[Image]:
    """Return the image of a Tiny LVLM-eHub question."""
    return _images("tiny_ehub", doc)


def tiny_ehub_results(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Return the word match by ability, and as part of the sum of the five percentages."""
    abilities = dict.fromkeys(get_benchmark("tiny_ehub").groups, "word_match.hit")
    hits = _hits("tiny_ehub", doc, results, abilities)
    return hits | {"all": list(hits.items())}


def tiny_visual(doc: Document) -> list[Image]:
    """Return the image of a question about the tiny world."""
    return _images("tiny", doc)


def tiny_results(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Return the exact match by domain."""
    return _hits("tiny", doc, results, dict.fromkeys(get_benchmark("tiny").groups, "plain_exact.hit"))


def percent(values: Sequence[float]) -> float:
    """Return the mean in percent."""
    return 100 * sum(values) / len(values)


def sum_of_percents(values: Sequence[Sequence[tuple[str, float]]]) -> float:
    """Return the sum of the groups' means in percent: Tiny LVLM-eHub's "All", out of 500."""
    groups: dict[str, list[float]] = {}
    for hits in values:
        for group, hit in hits:
            groups.setdefault(group, []).append(hit)
    return sum(percent(hits) for hits in groups.values())
