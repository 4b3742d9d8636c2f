"""The gradients by source equal naive ones, packed or not; what is derived from them is right on made-up problems."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from worlds.metered import Metered, make_metered

from llava_mole.analysis.conflict.gradients import Grams, Unit, measure_gradients, slices, source_gradient, units_of
from llava_mole.analysis.conflict.statistics import Alignment, conflicts, cosines, describe, half_width, summary
from llava_mole.analysis.undisturbed import undisturbed
from llava_mole.constants import IMAGE_TOKEN_INDEX
from llava_mole.mole import set_routing_inputs

ADAPTERS = {
    "mole": [],
    "lora": ["--adapter.method", "lora", "--adapter.preset", "paper"],
    "oracle": ["--adapter.options.router", "oracle", "--adapter.preset", "paper"],
    "sequence": ["--adapter.options.granularity", "sequence", "--adapter.options.shared_r", "1"],
    "task, linear": ["--adapter.preset", "moelora-task", "--adapter.options.num_tasks", "2"],
}


@pytest.fixture(scope="module", params=ADAPTERS)
def metered(world: Path, request: pytest.FixtureRequest) -> Metered:
    return make_metered(world, *ADAPTERS[request.param])


def naive_gradients(metered: Metered, number: int, source: int, reduction: str) -> dict[str, torch.Tensor]:
    """The gradient of a batch's loss from its definition: one sample after another, through all logits."""
    model, probe = metered.model, metered.probe()
    examples = [metered.dataset[p] for p in probe.positions[source][3 * number : 3 * number + 3]]
    for parameter in model.parameters():
        parameter.grad = None
    total = sum(sum(label != -100 for label in example.labels[1:]) for example in examples)
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        here = torch.full((1,), example.source_index)
        facts = {"source": here, "experts": here, "task": here, "prompt_mask": labels == -100}
        set_routing_inputs(model.language_model, **facts)
        embedded = model.causal_lm.get_input_embeddings()(ids.clamp(min=0))
        if example.images is not None:
            features = model.encode_images(example.images).flatten(0, 1)
            embedded = embedded.clone()
            embedded[ids == IMAGE_TOKEN_INDEX] = features
        logits = model.causal_lm(inputs_embeds=embedded).logits
        losses = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
        count = int((labels[0, 1:] != -100).sum())
        (losses.sum() / (3 * count if reduction == "sample_mean" else total)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in metered.parameters.items()}


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "single"])
def test_gradients_and_products_equal_naive_ones(metered: Metered, reduction: str, packed: bool) -> None:
    model, probe, units = metered.model, metered.probe(packed=packed), units_of(metered.parameters)
    with undisturbed(model):
        naive = [[naive_gradients(metered, n, s, reduction) for s in range(2)] for n in range(2)]
        for parameter in model.parameters():
            parameter.grad = None
        found = [
            [source_gradient(model, probe.batch(n, s), metered.parameters, reduction)[0] for s in range(2)]
            for n in range(2)
        ]
        grams = measure_gradients(model, probe.batch, probe.sources, 2, metered.parameters, reduction)
    for n, s in itertools.product(range(2), range(2)):
        for name, expected in naive[n][s].items():
            scale = max(float(expected.abs().max()), 1e-12)
            assert (found[n][s][name] - expected).abs().max() <= 1e-10 * scale, name
    flat = torch.stack([torch.stack([torch.cat(list(slices(own, units))) for own in batch]) for batch in naive])
    torch.testing.assert_close(grams.batch.sum(dim=0), flat @ flat.mT, rtol=1e-10, atol=0)
    sums = flat.sum(dim=0)
    torch.testing.assert_close(grams.total.sum(dim=0), sums @ sums.T, rtol=1e-10, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_units_cover_every_parameter_once(metered: Metered) -> None:
    parameters = metered.parameters
    units = units_of(parameters)
    gradients = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    assert sum(len(value) for value in slices(gradients, units)) == sum(p.numel() for p in parameters.values())
    assert {unit.layer for unit in units if unit.part != "projector"} <= {0, 1}
    assert not {unit.part for unit in units} - {
        "attention A", "attention B", "experts A", "experts B", "shared expert A", "shared expert B", "FFN A", "FFN B",
        "router", "projector",
    }  # fmt: skip


def made_up(gradients: torch.Tensor) -> Grams:
    """Grams of given gradients `[U, N, S, width]`."""
    sums = gradients.sum(dim=1)
    units = [Unit(str(n), "experts B", n, None) for n in range(len(gradients))]
    names = tuple(f"s{n}" for n in range(gradients.shape[2]))
    return Grams(names, units, gradients @ gradients.mT, sums @ sums.mT, torch.zeros(gradients.shape[1:3]).double())


def test_opposed_sources_have_cosine_minus_one() -> None:
    first = torch.randn(3, 4, 1, 7, dtype=torch.float64)
    numbers = summary(made_up(torch.cat([first, -2 * first], dim=2)))
    assert numbers["cosine"][0][1] == pytest.approx(-1)
    assert numbers["interval"][0][1] == pytest.approx(0, abs=1e-9)
    assert (numbers["conflicting_pairs"], numbers["compared_pairs"], numbers["conflict_share"]) == (12, 12, 1)
    assert numbers["norm"][1] == pytest.approx(2 * numbers["norm"][0])


def test_noise_lowers_the_cosine_but_not_the_estimate_without_noise() -> None:
    torch.manual_seed(0)
    signal = torch.zeros(1, 1, 2, 400, dtype=torch.float64)
    signal[..., 0, 0], signal[..., 1, 0], signal[..., 1, 1] = 1, 0.6, 0.8
    numbers = summary(made_up(signal + 0.1 * torch.randn(1, 400, 2, 400, dtype=torch.float64)))
    norm = 1 + 400 * 0.01
    assert numbers["cosine"][0][1] == pytest.approx(0.6 / norm, abs=0.01)
    assert numbers["cosine"][0][0] == pytest.approx(1 / norm, abs=0.01)
    assert numbers["noise_free"][0][1] == pytest.approx(0.6, abs=0.03)
    assert numbers["signal"][0] == pytest.approx(1, abs=0.03)
    assert numbers["norm"][0] == pytest.approx(norm**0.5, abs=0.03)


def test_one_batch_has_no_interval_and_a_zero_gradient_no_cosine() -> None:
    gradients = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    gradients[0, 0, 1] = 0
    grams = made_up(gradients)
    numbers = summary(grams)
    assert all(math.isnan(value) for row in numbers["interval"] for value in row)
    assert math.isnan(numbers["cosine"][0][0])
    alone = summary(grams, [0])
    assert math.isnan(alone["cosine"][0][1])
    assert alone["compared_pairs"] == 1
    assert grams.silent[0, 0].tolist() == [False, True, False]


def test_conflicts_are_counted_by_unit_batch_and_pair() -> None:
    products = torch.tensor([[[[1.0, -0.1], [-0.1, 1.0]], [[1.0, 0.2], [0.2, 1.0]]]], dtype=torch.float64)
    counted = conflicts(products)
    assert (counted.conflicting, counted.compared, counted.share) == (1, 2, 0.5)
    assert (counted.clear, counted.judged) == (0, 1)
    assert math.isnan(conflicts(products[:0]).share)
    opposed = conflicts(torch.tensor([[1, -0.5], [-0.5, 1]]).double().expand(1, 3, 2, 2))
    assert (opposed.clear, opposed.judged) == (1, 1)
    assert cosines(products)[0, 0, 0, 1] == pytest.approx(-0.1)


def test_half_width_is_students() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, math.nan], dtype=torch.float64)
    assert float(half_width(values)) == pytest.approx(4.303 * math.sqrt(7 / 3 / 3))
    assert float(half_width(torch.arange(50.0).double())) == pytest.approx(1.96 * math.sqrt(50 * 51 / 12 / 50))


def test_describe_adds_up(world: Path) -> None:
    metered = make_metered(world)
    probe = metered.probe()
    with undisturbed(metered.model):
        grams = measure_gradients(
            metered.model, probe.batch, probe.sources, 2, metered.parameters, "sample_mean", lambda _: None
        )
    result = describe(grams)
    assert result["sources"] == ["blue", "red"]
    assert set(result["layers"]) == {"0", "1"}
    squares = sum(torch.tensor(part["norm"]).square() for part in result["parts"].values())
    torch.testing.assert_close(squares, torch.tensor(result["all"]["norm"]).square())
    assert sum(part["units"] for part in result["parts"].values()) == len(grams.units)
    assert {(e["layer"], e["expert"]) for e in result["experts"]} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    alignment = Alignment.of(grams.batch, grams.total)
    assert alignment.cosine[0, 1] == pytest.approx(result["all"]["cosine"][0][1])
