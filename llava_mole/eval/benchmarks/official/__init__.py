"""Converters from a benchmark's official files to question lines, chosen by `data.converter` in its YAML file."""

from collections.abc import Callable, Mapping
from pathlib import Path

from llava_mole.eval.benchmarks.official import documents, general, multiple_choice
from llava_mole.eval.benchmarks.official.base import Converted

CONVERTERS: Mapping[str, Callable[[Path, Mapping[str, str]], Converted]] = {
    "tiny_ehub": general.tiny_ehub,
    "chart_qa": documents.chart_qa,
    "ureader": documents.ureader,
    "due_anls": documents.due_anls,
    "due_wtq": documents.due_wtq,
    "due_key_values": documents.due_key_values,
    "doc_vqa_val": documents.doc_vqa_val,
    "path_vqa": general.path_vqa,
    "text_vqa": general.text_vqa,
    "pope": general.pope,
    "mme": general.mme,
    "gqa": general.gqa,
    "llava_questions": general.llava_questions,
    "science_qa": multiple_choice.science_qa,
    "seed": multiple_choice.seed,
    "mmbench": multiple_choice.mmbench,
}
"""Name -> `(raw directory, options) -> Converted`."""
