"""LLaVA's modality-length-grouped order, against orders recorded from LLaVA's own sampler."""

from typing import Any

import pytest
import torch
from worlds import golden_cases

from llava_mole.common.errors import DataError
from llava_mole.conversation import Turn
from llava_mole.data.batching import grouped_order, modality_length
from llava_mole.data.records import Record

DOCUMENT, CASES = golden_cases.load_cases("sampler_cases")


def _order(case: dict[str, Any], generator: torch.Generator | None) -> list[int]:
    return grouped_order(
        case["lengths"], case["batch_size"], case["world_size"], generator, by_modality=case["group_by_modality"]
    )


@pytest.mark.parametrize("case", [c for c in CASES if c["error"] is None], ids=lambda c: c["name"])
def test_order_of_two_epochs_equals_the_recorded_one(case: dict[str, Any]) -> None:
    torch.manual_seed(case["global_seed"])
    seed = case["generator_seed"]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    assert _order(case, generator) == case["order"]
    assert _order(case, generator) == case["next_epoch_order"]


@pytest.mark.parametrize("case", [c for c in CASES if c["error"] is not None], ids=lambda c: c["name"])
def test_lengths_of_zero_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="has length 0"):
        _order(case, None)


def test_lengths_equal_the_recorded_ones() -> None:
    assert DOCUMENT["length_cases"]
    for case in DOCUMENT["length_cases"]:
        turns = tuple(Turn("user" if t["from"] == "human" else "assistant", t["value"]) for t in case["conversations"])
        record = Record("x", ("a.png",) if case["has_image"] else (), turns, "general", "data.json:1")
        assert modality_length(record) == case["modality_length"]


def test_a_record_without_words_is_refused_by_its_place() -> None:
    record = Record("x", (), (Turn("user", " "), Turn("assistant", "")), "general", "data.json:7")
    with pytest.raises(DataError, match="data.json:7"):
        modality_length(record)


def test_which_samples_share_a_step_does_not_depend_on_the_number_of_ranks() -> None:
    lengths = [((-1) ** i) * (1 + i % 37) for i in range(120)]
    steps = []
    for batch_size, chunks in ((4, 4), (2, 8), (1, 16)):
        torch.manual_seed(0)
        order = grouped_order(lengths, batch_size, chunks)
        steps.append([sorted(order[start : start + 16]) for start in range(0, 120, 16)])
    assert steps[0] == steps[1] == steps[2]
