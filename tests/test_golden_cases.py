"""The recorded results can be read, and the copies kept here stay small."""

from pathlib import Path

import golden_cases
import pytest

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


def test_every_kind_of_expert_case_is_kept() -> None:
    _, cases = golden_cases.load_cases("mole_ffn")
    assert {case["kind"] for case in cases} >= {"random", "zero_router", "one_expert_starved", "zero_B"}


def test_copies_stay_below_three_megabytes() -> None:
    folder = Path(__file__).parent / "golden"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_900_000
