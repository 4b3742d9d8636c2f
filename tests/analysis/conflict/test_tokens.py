"""Token gradients from hooks equal autograd's, and the shares are those of a loop over tokens."""

from pathlib import Path

import pytest
import torch
from worlds.metered import Metered, make_metered

from llava_mole.analysis.conflict.gradients import row_losses, source_gradient
from llava_mole.analysis.conflict.tokens import (
    Site,
    describe_tokens,
    find_sites,
    measure_tokens,
    token_conflicts,
    watched,
)
from llava_mole.analysis.undisturbed import undisturbed
from llava_mole.mole.access import active_config

ADAPTERS = {
    "straight-through": [],
    "top 2 of 3": ["--adapter.num_experts", "3", "--adapter.options.top_k", "2", "--adapter.preset", "paper",
                   "--adapter.options.expert_scale", "topk_renorm"],
    "dense": ["--adapter.options.mode", "dense", "--adapter.options.expert_scale", "prob", "--adapter.preset", "paper",
              "--adapter.options.balance_coef", "0.01"],
    "one expert": ["--adapter.num_experts", "1", "--adapter.preset", "paper"],
    "linear": ["--adapter.options.router_scope", "linear"],
    "model": ["--adapter.options.router_scope", "model", "--adapter.options.granularity", "sequence",
              "--adapter.options.balance_group", "micro_batch"],
    "lora": ["--adapter.method", "lora", "--adapter.preset", "paper"],
    "frozen projector": ["--train_projector", "false", "--adapter.options.attention_modules", "[]"],
}  # fmt: skip


@pytest.fixture(scope="module", params=ADAPTERS)
def metered(world: Path, request: pytest.FixtureRequest) -> Metered:
    made = make_metered(world, *ADAPTERS[request.param])
    made.model.projector.requires_grad_(made.config.train_projector)
    return made


def noted(metered: Metered) -> tuple[list[Site], list[list[int]]]:
    """Both sources' first batch, noted by the sites."""
    model, probe = metered.model, metered.probe()
    sites, tokens = find_sites(model), []
    with undisturbed(model), watched(model, sites) as embedded:
        for source in range(2):
            rows = probe.batch(0, source)
            for loss in row_losses(model, rows, "sample_mean"):
                torch.autograd.grad(loss, embedded.pop())
            tokens.append([row["input_ids"].numel() for row in rows])
    return sites, tokens


def test_token_gradients_add_up_to_the_gradient_of_b(metered: Metered) -> None:
    model, probe = metered.model, metered.probe()
    sites, tokens = noted(metered)
    assert len(sites) == 6
    with undisturbed(model):
        gradients = [
            source_gradient(model, probe.batch(0, source), metered.parameters, "sample_mean")[0] for source in range(2)
        ]
    for site in sites:
        left = torch.cat(site.hidden) * site.scaling * torch.cat(site.weights).unsqueeze(-1)
        split = left.split([sum(own) for own in tokens]), torch.cat(site.dy).split([sum(own) for own in tokens])
        base, _, projection = site.name.rpartition(".")
        for source in range(2):
            found = torch.einsum("tkr,to->kro", split[0][source], split[1][source])
            names = [
                name
                for name in metered.parameters
                if (name.startswith(f"{base}.mole_") or name.startswith(f"{base}.{projection}.lora_"))
                and name.endswith((f"{projection}_B", "linear_B", "lora_B.default.weight"))
            ]
            assert len(names) == 1, (site.name, names)
            expected = gradients[source][names[0]]
            expected = expected.T.unsqueeze(0) if "lora_" in names[0] else expected
            torch.testing.assert_close(found, expected.view_as(found), rtol=1e-9, atol=1e-14)


def test_shares_equal_a_loop_over_tokens(metered: Metered) -> None:
    sites, tokens = noted(metered)
    sizes = [sum(own) for own in tokens]
    results = token_conflicts(sites, tokens)
    experts = len(results) // len(sites)
    for number, result in list(enumerate(results))[:: max(1, len(results) // 4)]:
        site, k = sites[number // experts], number % experts
        hidden, dy, weights = torch.cat(site.hidden)[:, k], torch.cat(site.dy), torch.cat(site.weights)[:, k]
        sources: list[list[torch.Tensor]] = [[], []]
        for token in range(sum(sizes)):
            gradient = torch.outer(site.scaling * weights[token] * hidden[token], dy[token])
            if gradient.any():
                sources[int(token >= sizes[0])].append(gradient)
        for i in range(2):
            assert result.tokens[i] == len(sources[i])
            for j in range(2):
                opposed = 0
                for n, gradient in enumerate(sources[i]):
                    others = [g for m, g in enumerate(sources[j]) if i != j or m != n]
                    opposed += bool(others) and float((gradient * sum(others)).sum()) < 0
                if sources[i] and len(sources[j]) > (i == j):
                    assert result.against[i, j] == pytest.approx(opposed / len(sources[i]))
        if all(sources):
            mean = [sum(own).flatten() / len(own) for own in sources]
            expected = torch.nn.functional.cosine_similarity(mean[0], mean[1], dim=0)
            assert result.cosine[0, 1] == pytest.approx(float(expected))


def test_the_configured_backend_comes_back(metered: Metered) -> None:
    config = active_config(metered.model.language_model)
    sites, _ = noted(metered)
    assert config is None or config.backend == "auto"
    assert not [site.name for site in sites if site.linear._forward_hooks]


def test_opposed_tokens_conflict_and_equal_ones_do_not() -> None:
    left, dy = torch.rand(1, 3).double().expand(8, 3), torch.rand(1, 5).double().expand(8, 5)
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4).double().unsqueeze(-1)
    ones = torch.ones(8, 1).double()
    site = Site("s", 0, torch.nn.Identity(), lambda: (left, left), 2.0, None, [left.unsqueeze(1)], [ones], [dy * sign])
    (result,) = token_conflicts([site], [[4], [4]])
    assert result.against.tolist() == [[0, 1], [1, 0]]
    assert result.cosine[0, 1] == pytest.approx(-1)
    described = describe_tokens([[result]])
    assert described["all"]["against"] == [[0, 1], [1, 0]]
    assert described["all"]["tokens"] == [4, 4]


def test_several_batches_are_described(world: Path) -> None:
    metered = make_metered(world)
    probe = metered.probe()
    with undisturbed(metered.model):
        found = measure_tokens(metered.model, probe.batch, probe.sources, 2, "sample_mean")
    described = describe_tokens(found)
    assert set(described["layers"]) == {"0", "1"}
    assert [(e["layer"], e["expert"]) for e in described["experts"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 <= share <= 1 for row in described["all"]["against"] for share in row)
