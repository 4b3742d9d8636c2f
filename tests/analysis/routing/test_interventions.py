"""Interventions equal computations by hand, answers are scored as greedy decoding would, and everything comes back."""

from pathlib import Path

import pytest
import torch
from worlds.metered import Metered, make_metered

from llava_mole.analysis.probe import Row, send
from llava_mole.analysis.routing.interventions import (
    Scores,
    _right_answers,
    count_scores,
    intervene,
    plan,
    routers,
    score_answers,
)
from llava_mole.analysis.routing.meter import measure_routing
from llava_mole.analysis.routing.tokens import route_tokens
from llava_mole.analysis.undisturbed import undisturbed
from llava_mole.common.errors import ConfigError
from llava_mole.model.batch_loss import forward_losses, next_token_targets
from llava_mole.mole.access import apply_to_experts, overridden
from llava_mole.mole.layer import ExpertLayer

ADAPTERS = {
    "top 1": ["--adapter.num_experts", "3", "--adapter.preset", "paper", "--adapter.options.shared_r", "1"],
    "prob": ["--adapter.num_experts", "3", "--adapter.options.expert_scale", "prob"],
    "top 2": ["--adapter.num_experts", "3", "--adapter.options.top_k", "2", "--adapter.options.expert_scale",
              "topk_renorm", "--adapter.preset", "paper"],
    "oracle": ["--adapter.num_experts", "3", "--adapter.options.router", "oracle", "--adapter.preset", "paper"],
    "linear": ["--adapter.num_experts", "3", "--adapter.options.router_scope", "linear"],
    "model": ["--adapter.num_experts", "3", "--adapter.options.router_scope", "model",
              "--adapter.options.granularity", "sequence", "--adapter.options.balance_group", "micro_batch"],
    "shared A": ["--adapter.num_experts", "3", "--adapter.options.shared_a", "true", "--adapter.preset", "paper"],
}  # fmt: skip


@pytest.fixture(scope="module", params=ADAPTERS)
def metered(world: Path, request: pytest.FixtureRequest) -> Metered:
    return make_metered(world, *ADAPTERS[request.param])


def rows_of(metered: Metered) -> list[Row]:
    probe = metered.probe(1, 4)
    return [row for source in range(2) for row in probe.batch(0, source)]


@torch.no_grad()
def losses(metered: Metered, row: Row) -> torch.Tensor:
    with undisturbed(metered.model):
        return forward_losses(metered.model, send(metered.model, row))[0]


def edit_experts(metered: Metered, order: list[int | None]) -> None:
    """Put expert `order[k]` in the place of expert k, by hand: None is an expert that does nothing."""
    for module in metered.model.modules():
        if isinstance(module, ExpertLayer):
            stack = module.experts("default")
            for name, value in list(stack.named_parameters()):
                if value.dim() == 3 and "_shared_" not in name:
                    new = [torch.zeros_like(value[0]) if k is None else value[k].clone() for k in order]
                    value.data.copy_(torch.stack(new))


@pytest.mark.parametrize(
    ("name", "order"), [("force 1", [1, 1, 1]), ("swap 0 and 2", [2, 1, 0]), ("ablate 0", [None, 1, 2])]
)
def test_interventions_equal_edited_experts(metered: Metered, name: str, order: list[int | None]) -> None:
    rows = rows_of(metered)
    before = {key: value.clone() for key, value in metered.model.state_dict().items()}
    intact = [losses(metered, row) for row in rows]
    matrices = {layer: plan(count)[name] for layer, count in routers(metered.model).items()}
    with apply_to_experts(metered.model.language_model, matrices):
        found = [losses(metered, row) for row in rows]
    assert all(torch.equal(losses(metered, row), value) for row, value in zip(rows, intact, strict=True))
    edit_experts(metered, order)
    try:
        expected = [losses(metered, row) for row in rows]
    finally:
        metered.model.load_state_dict(before)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if not name.startswith("ablate"):  # a router may leave the ablated expert without tokens
        assert any(not torch.allclose(a, b) for a, b in zip(found, intact, strict=True))


def test_the_report_of_all_interventions(metered: Metered) -> None:
    rows = rows_of(metered)
    before = {key: value.clone() for key, value in metered.model.state_dict().items()}
    calls: list[int] = []

    def score() -> Scores:
        calls.append(1)
        return score_answers(metered.model, rows)

    with undisturbed(metered.model):
        found = intervene(metered.model, score, ["blue", "red"], by_layer=True)
    counts = list(routers(metered.model).values())
    assert len(calls) == count_scores(counts, by_layer=True) == 1 + 3 + 1 + 3 + 3 + 1 + sum(counts)
    assert found["intact"]["all"]["samples"] == 8
    assert found["intact"]["all"]["loss_change"] == 0
    assert set(found["by layer"]) == set(routers(metered.model))
    for own in found["all layers"].values():
        mean = sum(own[source]["loss"] for source in ("blue", "red")) / 2
        assert own["all"]["loss"] == pytest.approx(mean)
        assert own["all"]["loss_change"] == pytest.approx(own["all"]["loss"] - found["intact"]["all"]["loss"])
    assert all(torch.equal(value, before[key]) for key, value in metered.model.state_dict().items())
    assert not [m for m in metered.model.modules() if isinstance(m, ExpertLayer) and m.routing.override]


def test_packed_rows_change_no_score(metered: Metered) -> None:
    packed, single = metered.probe(1, 4), metered.probe(1, 4, packed=False)
    for source in range(2):
        with undisturbed(metered.model):
            one, other = (score_answers(metered.model, probe.batch(0, source)) for probe in (packed, single))
        torch.testing.assert_close(one.loss.sort().values, other.loss.sort().values, rtol=1e-9, atol=1e-12)
        assert torch.equal(one.right.sort().values, other.right.sort().values)


def test_routing_of_every_token_is_described(metered: Metered) -> None:
    rows, tokenizer = rows_of(metered), metered.dataset.limits.tokenizer.hf
    result, routed = measure_routing(metered.model, rows, ["blue", "red"], tokenizer, permutations=20)
    assert routed.expert.shape == (len(result["routers"]), sum(row["input_ids"].numel() for row in rows))
    by = result["routing"]["by"]
    assert set(by["modality"]) == {"image", "text"}
    assert set(by["role"]) == {"image", "prompt", "answer"}
    for kind in by:
        assert sum(own["tokens"] for own in by[kind].values()) == result["routing"]["tokens"]
    for layer, load in enumerate(result["routing"]["load"]):
        assert sum(load) == pytest.approx(1)
        weighted = sum(own["tokens"] * own["load"][layer][0] for own in by["source"].values())
        assert weighted / result["routing"]["tokens"] == pytest.approx(load[0])
    if "oracle" in str(metered.config.adapter.options):
        assert not result["has_probabilities"]
        assert result["information"]["source"]["share"] == pytest.approx([1] * len(result["routers"]))
    again = route_tokens(metered.model, rows, tokenizer)
    assert torch.equal(again.expert, routed.expert)


def test_answers_are_right_if_all_their_tokens_are() -> None:
    # Two samples in a row: one with two answers, of which the second is wrong in its last token; one with one answer.
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1]]).bool()
    sample = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1]])
    hits = torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    assert _right_answers(hits, mask, sample, 2).tolist() == [0.5, 1]
    # Neighbouring answers of two samples are two answers.
    mask, sample = torch.ones(1, 4).bool(), torch.tensor([[0, 0, 1, 1]])
    assert _right_answers(torch.tensor([1, 0, 1, 1]).bool(), mask, sample, 2).tolist() == [0, 1]
    assert _right_answers(torch.zeros(0).bool(), torch.zeros(1, 3).bool(), torch.zeros(1, 3).long(), 1).tolist() == [0]


def test_a_right_answer_is_the_one_that_greedy_decoding_writes(world: Path) -> None:
    """Reference answers are replaced with what the model writes itself: then all of them are right."""
    metered = make_metered(world, dtype=torch.float32)
    model, probe = metered.model, metered.probe(1, 3, packed=False)
    rows = probe.batch(0, 0)
    with undisturbed(model), torch.no_grad():
        for row in rows:
            positions = next_token_targets(row["labels"])[0][0].nonzero().flatten().tolist()
            for position in positions:
                logits = model(row["input_ids"], row["attention_mask"], row["images"])
                row["input_ids"][0, position + 1] = row["labels"][0, position + 1] = logits[0, position].argmax()
        assert score_answers(model, rows).right.tolist() == [1, 1, 1]
        rows[0]["labels"][0, positions[-1] + 1] += 1
        row = rows[0]
        last = next_token_targets(row["labels"])[0][0].nonzero().flatten()[-1]
        row["labels"][0, last + 1] = (int(row["labels"][0, last + 1]) + 1) % 400
        assert score_answers(model, rows).right.tolist()[1:] == [1, 1]
        assert score_answers(model, rows).right[0] < 1


def test_what_cannot_be_intervened_on_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="no router with a choice"):
        routers(make_metered(world, "--adapter.method", "lora", "--adapter.preset", "paper").model)
    mixlora = make_metered(world, "--adapter.preset", "mixlora", "--adapter.num_experts", "3")
    with pytest.raises(ConfigError, match="ffn_output"):
        intervene(mixlora.model, lambda: score_answers(mixlora.model, rows_of(mixlora)), ["blue", "red"])
    with (
        pytest.raises(ValueError, match="no layer with experts is called 'nowhere'"),
        overridden(mixlora.model, {"nowhere": lambda route: route}),
    ):
        pass
