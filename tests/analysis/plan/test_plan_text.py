"""The plan's tables never run together, and its times are in units that show them."""

import pytest

from llava_mole.analysis.plan.text import HOURS, TERAFLOPS, digits, in_unit, unit_for


@pytest.mark.parametrize(
    ("hours", "unit", "text"),
    [
        ([11.6, 744.0], "h", "11.6 h"),
        ([0.5, 0.02], "min", "30.0 min"),
        ([0.01, 0.005], "s", "36.0 s"),
        ([1e-5], "ms", "36.0 ms"),
        ([1097.4], "h", "1,097 h"),
    ],
)
def test_times_have_the_unit_in_which_the_longest_is_at_least_one(hours: list[float], unit: str, text: str) -> None:
    assert unit_for(hours, HOURS).name == unit
    assert in_unit(hours[0], unit_for(hours, HOURS)) == text


def test_operations_too() -> None:
    assert unit_for([30.5, 1e-3], TERAFLOPS).name == "TFLOP"
    assert unit_for([2e-3], TERAFLOPS).name == "GFLOP"
    assert unit_for([2e-7], TERAFLOPS).name == "MFLOP"
    assert [digits(value) for value in (1234.0, 99.94, 10.0, 9.99, 0.0123)] == [
        "1,234",
        "99.9",
        "10.0",
        "9.99",
        "0.0123",
    ]
