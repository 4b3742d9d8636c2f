"""The recorded results can be read, and the copies kept here stay small."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from worlds import golden_cases

COPIES = Path(__file__).parents[1] / "golden"
JSON_ONLY = ["collate_cases", "sampler_cases"]
TEMPLATES = ["plain", "vicuna_v1", "llava_v1", "llava_llama_2", "mpt", "chatml_direct"]


@pytest.mark.parametrize("name", [*JSON_ONLY, *(f"prompts_labels_{template}" for template in TEMPLATES)])
def test_json_files_have_cases(name: str) -> None:
    fields, cases = golden_cases.load_cases(name)
    assert fields["provenance"]
    assert cases
    assert "cases" not in fields


@pytest.mark.parametrize("name", ["mole_ffn", "mole_balance", "pad_cases", "splice_cases"])
def test_each_keyed_case_has_arrays(name: str) -> None:
    _, cases = golden_cases.load_cases(name)
    arrays = golden_cases.load_arrays(name)
    assert cases
    for case in cases:
        assert any(key.startswith(case["key"]) for key in arrays), case["key"]


def test_copies_kept_here_hold_every_sort_of_case() -> None:
    def kept(name: str) -> list[dict[str, Any]]:
        return json.loads(gzip.decompress((COPIES / f"{name}.json.gz").read_bytes()))["cases"]

    assert {case["kind"] for case in kept("mole_ffn")} == {"random", "zero_router", "one_expert_starved", "zero_B"}
    for template in ("vicuna_v1", "llava_llama_2"):
        cases = kept(f"prompts_labels_{template}")
        for key in ("legacy", "has_image", "quirk", "all_masked"):
            assert {bool(case[key]) for case in cases} == {True, False}, key
        assert any(case["error"] for case in cases)
    collated = kept("collate_cases")
    assert any(case["pad_token_id"] in row["input_ids"] for case in collated for row in case["instances"])


def test_copies_stay_below_three_megabytes() -> None:
    assert sum(path.stat().st_size for path in COPIES.iterdir()) < 2_900_000
