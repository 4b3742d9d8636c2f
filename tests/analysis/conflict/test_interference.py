"""A step is AdamW's, changes the losses as a naive step does, and leaves no bit behind."""

from pathlib import Path

import pytest
import torch
from worlds.metered import Metered, make_metered

from llava_mole.analysis.conflict.gradients import source_gradient
from llava_mole.analysis.conflict.interference import StepRule, loss_of, measure_interference, stepped
from llava_mole.analysis.undisturbed import undisturbed


@pytest.fixture(scope="module")
def metered(world: Path) -> Metered:
    return make_metered(world, dtype=torch.float32)


def rule(metered: Metered, rate: float = 1e-3, clip: float = 1.0) -> StepRule:
    return StepRule(dict.fromkeys(metered.parameters, rate), clip)


def test_without_state_the_step_is_a_tenth_of_adamws_first(metered: Metered) -> None:
    torch.manual_seed(0)
    gradients = {name: torch.randn_like(p) for name, p in metered.parameters.items()}
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in metered.parameters.items()}
    for name, copy in copies.items():
        copy.grad = gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(copies.values(), 1.0)
    torch.optim.AdamW(copies.values(), lr=1e-3, weight_decay=0).step()
    with stepped(metered.parameters, rule(metered, 1e-2).updates(gradients)):
        for name, parameter in metered.parameters.items():
            torch.testing.assert_close(parameter, copies[name], rtol=1e-5, atol=1e-6)


def test_with_the_runs_moments_the_step_is_adamws_with_the_gradient_minus_that_without() -> None:
    g = torch.tensor([0.3, -2.0]).double()
    moved = []
    for gradient in (g, torch.zeros(2).double()):
        parameter = torch.nn.Parameter(torch.zeros(2).double())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0)
        moments = torch.tensor([0.5, 4.0]).double()
        first = torch.tensor([0.1, 0.2]).double()
        optimizer.state[parameter] = {"step": torch.tensor(1e6), "exp_avg": first, "exp_avg_sq": moments.clone()}
        parameter.grad = gradient
        optimizer.step()
        moved.append(parameter.detach())
    updates = StepRule({"p": 0.1}, 0, {"p": moments}).updates({"p": g})
    torch.testing.assert_close(updates["p"], moved[0] - moved[1], rtol=3e-3, atol=0)  # v itself moves by 0.1%


def test_the_matrix_equals_naive_steps_and_no_bit_changes(metered: Metered) -> None:
    model, probe = metered.model, metered.probe()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = (probe.batch, probe.sources, 2, metered.parameters, "sample_mean", rule(metered, 1e-2))
    with undisturbed(model):
        found = measure_interference(model, *arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    changes = torch.zeros(2, 2, 2)
    with undisturbed(model):
        for number in range(2):
            held = [probe.batch(1 - number, source) for source in range(2)]
            for source in range(2):
                optimizer = torch.optim.AdamW(metered.parameters.values(), lr=1e-3, weight_decay=0)
                gradients, _ = source_gradient(model, probe.batch(number, source), metered.parameters, "sample_mean")
                for name, parameter in metered.parameters.items():
                    parameter.grad = gradients[name]
                torch.nn.utils.clip_grad_norm_(metered.parameters.values(), 1.0)
                losses = [loss_of(model, rows, "sample_mean") for rows in held]
                optimizer.step()
                after = [loss_of(model, rows, "sample_mean") for rows in held]
                changes[number, source] = torch.tensor(after) - torch.tensor(losses)
                optimizer.zero_grad()
                model.load_state_dict(before)
    torch.testing.assert_close(found.change.float(), changes.mean(dim=0), rtol=2e-3, atol=2e-4)
    assert (found.change.diagonal() < 0).all(), "a step on a source helps it"
    assert found.interval.isfinite().all()


def test_weights_come_back_after_an_error(metered: Metered) -> None:
    before = {name: parameter.detach().clone() for name, parameter in metered.parameters.items()}
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        stepped(metered.parameters, {name: torch.ones_like(p) for name, p in before.items()}),
    ):
        raise RuntimeError("out of memory")
    assert all(torch.equal(parameter, before[name]) for name, parameter in metered.parameters.items())
