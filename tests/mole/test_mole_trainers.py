"""Any training loop trains the router: transformers' Trainer equals a loop written by hand, to 1e-6."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from mole.preset_cases import OWN, SMALL, config_of
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother
from worlds.mole_training import (
    BALANCING,
    adapted,
    assert_equal_adapters,
    batches,
    by_hand,
    collate,
    equal,
    is_balanced,
    known_from_the_step_before,
    per_batch,
    per_token,
    routers,
    shares,
    skew,
    token_losses,
    toy_rows,
    train,
    trainable,
)

from llava_mole.mole import (
    PRESETS,
    MoleConfig,
    MoleMlp,
    active_config,
    balance_loss,
    collect_routing,
    leave_balance_loss_to_caller,
    mole_after_step,
    mole_auxiliary_loss,
    mole_drop_step,
    set_routing_inputs,
    training,
)

Make = Callable[[], LlamaForCausalLM]


CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": dict(PRESETS["released"], dropout=0.0),
    "coupled": PRESETS["coupled"],
    "best": PRESETS["best"],
    "supervised": {"balance_tokens": "supervised"},
    "stratified": {"balance_tokens": "stratified", "balance_group": "global_batch"},
    "z_loss": {"balance_coef": 0.0, "z_loss_coef": 0.1, "expert_scale": "prob"},
    "loss_free": {"balance_coef": 0.0, "expert_scale": "prob", "bias_update_rate": 0.1},
    "pooled_in_micro_batches": {"balance_group": "micro_batch", "balance_layers": "pooled"},
    "dense": {"mode": "dense"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("steps", [1, 4])
def test_trainer_equals_a_loop_by_hand(tiny_llama: Make, tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    model, reference = adapted(tiny_llama(), **options), adapted(tiny_llama(), add_balance_loss=False, **options)
    before = routers(model)
    train(model, toy_rows(20), tmp_path, gradient_accumulation_steps=steps)  # 10 batches: the last of 3 steps has 2
    by_hand(reference, batches(20), steps, per_token, shares)
    assert_equal_adapters(model, reference)
    if options.get("balance_coef") != 0.0:
        assert all((value - before[name]).abs().max() > 1e-3 for name, value in routers(model).items())


def test_a_loss_that_the_loop_divides_takes_the_balance_loss_along(tiny_llama: Make, tmp_path: Path) -> None:
    model, reference = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)
    model.get_base_model().accepts_loss_kwargs = False  # as in models without num_items_in_batch
    train(model, toy_rows(20), tmp_path, gradient_accumulation_steps=4)

    def divided(logits: Tensor, labels: Tensor, targets_of_step: int) -> Tensor:
        return per_batch(logits, labels, targets_of_step) / divisor.pop(0)

    divisor = [4] * 8 + [2] * 2
    by_hand(reference, batches(20), 4, divided, equal)
    assert_equal_adapters(model, reference)


@pytest.mark.parametrize("steps", [1, 4])
def test_label_smoothing(tiny_llama: Make, tmp_path: Path, steps: int) -> None:
    model, reference = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)
    train(model, toy_rows(20), tmp_path, gradient_accumulation_steps=steps, label_smoothing_factor=0.2)
    smooth = LabelSmoother(epsilon=0.2)

    def smoothed(logits: Tensor, labels: Tensor, targets_of_step: int) -> Tensor:
        return smooth({"logits": logits}, labels, shift_labels=True, num_items_in_batch=targets_of_step)

    by_hand(reference, batches(20), steps, smoothed, known_from_the_step_before(steps))
    assert_equal_adapters(model, reference)


def test_a_loss_function_of_the_user(tiny_llama: Make, tmp_path: Path) -> None:
    model, reference = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return token_losses(outputs.logits, labels).sum() / num_items_in_batch

    train(model, toy_rows(12), tmp_path, gradient_accumulation_steps=2, compute_loss_func=own)
    by_hand(reference, batches(12), 2, per_token, known_from_the_step_before(2))
    assert_equal_adapters(model, reference)


@pytest.mark.parametrize("preset", OWN)
def test_every_preset_moves_every_router_and_balances_the_load(tiny_llama: Make, tmp_path: Path, preset: str) -> None:
    torch.manual_seed(0)
    model = skew(get_peft_model(tiny_llama(), MoleConfig.from_preset(preset, r=4, task_type="CAUSAL_LM")))
    before = routers(model)
    assert not is_balanced(model, preset)
    train(model, toy_rows(64), tmp_path, **BALANCING)
    assert len(before) == (4 if preset == "released" else 2)
    assert all((value - before[name]).norm() > 0.02 for name, value in routers(model).items())
    assert is_balanced(model, preset)


@pytest.mark.parametrize("case", SMALL)
def test_every_router_of_related_methods_moves(tiny_llama: Make, tmp_path: Path, case: str) -> None:
    """Without bounds on the load: most of them use all experts of every token and have no balance loss."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config_of(case))
    rows = [{"ids": row["ids"][:6], "prompt": torch.tensor(2)} for row in toy_rows(64)]
    samples = torch.arange(8)  # of every batch
    set_routing_inputs(model, task=samples % 3, source=samples % 2, prompt_mask=(torch.arange(6) < 2).expand(8, 6))
    before = routers(model)
    train(model, rows, tmp_path, **BALANCING)
    assert before
    assert all((value - before[name]).norm() > 0.02 for name, value in routers(model).items())


def test_bfloat16_autocast_keeps_the_balance_loss_in_float32(tiny_llama: Make) -> None:
    model = adapted(tiny_llama())
    batch = collate(toy_rows(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    routing = collect_routing(model)
    expected = 0.5 * balance_loss(routing, batch["attention_mask"].bool())
    own = token_losses(out.logits.float(), batch["labels"]).sum() / (batch["labels"][:, 1:] != -100).sum()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss - own, expected, rtol=0, atol=1e-6)
    out.loss.backward()
    assert all(layer.router("default").weight.grad.abs().max() > 0 for layer in routing.layers)


def test_trainer_in_bfloat16_autocast(tiny_llama: Make, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    before = routers(model)
    train(model, toy_rows(8), tmp_path, bf16=True)
    assert all((value - before[name]).abs().max() > 1e-3 for name, value in routers(model).items())


@pytest.mark.parametrize("which", ["loss", "logits", "both", "tuple", "positional", "hidden_states", "frozen outputs"])
def test_whichever_output_the_loss_is_computed_from(tiny_llama: Make, which: str) -> None:
    """The router's gradient is that of the auxiliary loss, once."""
    model = adapted(tiny_llama())
    if which == "frozen outputs":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mole_router" in name)
    batch = collate(toy_rows(2))
    if which == "tuple":
        loss = model(**batch, return_dict=False)[0]
    elif which == "positional":
        loss = model.base_model.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    else:
        out = model(**batch, output_hidden_states=which == "hidden_states")
        loss = {"loss": out.loss, "logits": out.logits.square().mean(), "both": out.loss + out.logits.mean()}.get(which)
        if which == "hidden_states":
            loss = out.hidden_states[-1].square().mean()
        elif which == "frozen outputs":
            loss = out.logits.square().mean()
    layers = collect_routing(model).layers
    loss.backward()
    found = [layer.router("default").weight.grad.clone() for layer in layers]
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**batch)
        mole_auxiliary_loss(model, token_mask=batch["attention_mask"].bool()).backward()
    for layer, gradient in zip(layers, found, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, layer.router("default").weight.grad)


def test_outputs_keep_their_values_and_can_be_changed_in_place(tiny_llama: Make) -> None:
    model, plain = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)
    batch = collate(toy_rows(2))
    logits = model(**batch).logits
    assert torch.equal(logits, plain(**batch).logits)
    logits /= 2.0
    logits[:, :, 0] = 0.0
    logits.square().mean().backward()
    assert model.base_model.model.model.layers[0].mlp.router("default").weight.grad.abs().max() > 0


def test_nothing_is_added_outside_a_training_pass(tiny_llama: Make) -> None:
    model, plain = adapted(tiny_llama()), adapted(tiny_llama(), add_balance_loss=False)
    batch = collate(toy_rows(2))
    expected = plain(**batch).loss
    assert model(**batch).loss > expected + 0.1
    with torch.no_grad():
        assert model(**batch).loss == expected
    with model.disable_adapter():
        base = model(**batch)
        assert base.loss == tiny_llama()(**batch).loss
        assert not base.logits.requires_grad
    model.eval()
    assert model(**batch).loss == expected
    leave_balance_loss_to_caller(model.train())
    assert model(**batch).loss == expected
    assert active_config(model).add_balance_loss, "what is saved does not change"


def test_a_call_by_hand_takes_the_place_of_the_automatic_one(tiny_llama: Make) -> None:
    options = {"balance_group": "global_batch", "expert_scale": "straight_through"}
    model, reference = adapted(tiny_llama(), **options), adapted(tiny_llama(), add_balance_loss=False, **options)
    batch = collate(toy_rows(2))
    mask = batch["attention_mask"].bool()
    for each in (model, reference):
        optimizer = torch.optim.SGD(trainable(each).values(), lr=0.5)
        for _ in range(3):
            loss = each(**batch).loss
            if each is model:
                with pytest.warns(UserWarning, match="add_balance_loss=False in MoleConfig"):
                    loss = loss + mole_auxiliary_loss(each, token_mask=mask)
            else:
                loss = loss + mole_auxiliary_loss(each, token_mask=mask)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mole_after_step(each)
    assert_equal_adapters(model, reference)
    model(**batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert mole_auxiliary_loss(model, token_mask=mask) > 0


def test_without_a_tuner_in_the_model(tiny_llama: Make, tmp_path: Path) -> None:
    """PEFT's inject_adapter_in_model and transformers' add_adapter leave layers only."""
    options = {"balance_group": "global_batch", "expert_scale": "straight_through", "bias_update_rate": 0.1}
    reference = adapted(tiny_llama(), **options)
    train(reference, toy_rows(12), tmp_path)
    expected = {n.removeprefix("base_model.model."): p for n, p in reference.state_dict().items() if "mole_" in n}
    for way in ("inject", "add"):
        torch.manual_seed(1)
        base, config = tiny_llama(), MoleConfig(r=4, balance_coef=0.5, **options)
        torch.manual_seed(1)
        if way == "inject":
            inject_adapter_in_model(config, base)
        else:
            base.add_adapter(config)
        assert active_config(base) is not None
        train(base, toy_rows(12), tmp_path)
        found = base.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=f"{way}: {name}")


def test_copies_and_pickles_count_for_themselves(tiny_llama: Make) -> None:
    model = adapted(tiny_llama(), balance_group="global_batch")
    batch = collate(toy_rows(2))
    model(**batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD(trainable(other).values(), lr=0.1)
        other(**batch).loss.backward()
        optimizer.step()
        loads = [layer.current_state().load.sum().item() for layer in other.modules() if isinstance(layer, MoleMlp)]
        assert loads == [int(batch["attention_mask"].sum())] * 2
        own = [layer.current_state().load.sum().item() for layer in model.modules() if isinstance(layer, MoleMlp)]
        assert own == [0, 0]


def test_a_removed_adapter_adds_nothing(tiny_llama: Make) -> None:
    model = adapted(tiny_llama())
    batch = collate(toy_rows(2))
    model(**batch).loss.backward()
    base = model.unload()
    assert base(**batch).loss == tiny_llama()(**batch).loss


def loads_of(model: nn.Module) -> list[list[int]]:
    return [m.current_state().load[0].tolist() for m in model.modules() if isinstance(m, MoleMlp)]


def test_counters_follow_the_optimizer_that_holds_the_adapter(tiny_llama: Make) -> None:
    options = {"balance_group": "global_batch", "expert_scale": "straight_through", "bias_update_rate": 0.1}
    model, other = adapted(tiny_llama(), **options), nn.Linear(2, 2)
    first, second = collate(toy_rows(4)[:2]), collate(toy_rows(4)[2:])
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    unrelated = torch.optim.SGD(other.parameters(), lr=0.1)
    model(**first).loss.backward()
    other(torch.ones(2)).sum().backward()
    unrelated.step()
    assert loads_of(model) == [[0, 0, 0], [0, 0, 0]], "an optimizer of another model"
    model(**second).loss.backward()
    tokens = int(first["attention_mask"].sum() + second["attention_mask"].sum())
    optimizer.step()
    loads = loads_of(model)
    assert [sum(load) for load in loads] == [tokens, tokens], "both micro-batches"
    biases = [m.current_state().bias_steps.tolist() for m in model.modules() if isinstance(m, MoleMlp)]
    assert any(biases[0])
    optimizer.step()
    mole_after_step(model)
    assert loads_of(model) == loads, "a step is counted once"
    assert [m.current_state().bias_steps.tolist() for m in model.modules() if isinstance(m, MoleMlp)] == biases
    model(**first).loss.backward()
    mole_drop_step(model)
    optimizer.step()
    assert loads_of(model) == loads, "a dropped step is forgotten"


def test_a_skipped_step_is_counted_with_the_next(tiny_llama: Make) -> None:
    model = adapted(tiny_llama(), balance_group="global_batch")
    batch = collate(toy_rows(2))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for overflow in (True, False):
        scaler.scale(model(**batch).loss).backward()
        if overflow:
            next(iter(trainable(model).values())).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert [sum(load) for load in loads_of(model)] == [
            0 if overflow else 2 * int(batch["attention_mask"].sum())
        ] * 2


def test_a_router_without_gradient_is_reported_once(tiny_llama: Make) -> None:
    batch = collate(toy_rows(2))

    def steps(model: nn.Module, number: int) -> list[str]:
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(number):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return [str(warning.message) for warning in caught]

    blind = adapted(tiny_llama(), add_balance_loss=False)
    assert steps(blind, 9) == []
    (message,) = steps(blind, 15)
    assert message.startswith("2 trainable routers, model.layers.0.mlp first, have had no gradient in 10 optimizer")
    assert "add_balance_loss" in message
    assert "mole_auxiliary_loss" in message
    assert steps(adapted(tiny_llama()), 12) == []
    assert steps(adapted(tiny_llama(), add_balance_loss=False, train_router=False), 12) == []
    assert steps(adapted(tiny_llama(), add_balance_loss=False, expert_scale="straight_through"), 12) == []


def test_a_loss_from_outside_in_float16_is_warned_about(tiny_llama: Make) -> None:
    model = adapted(tiny_llama())
    batch = collate(toy_rows(2))
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(**batch)
    with pytest.warns(UserWarning, match="loss scale is unknown"):
        out.logits.float().square().mean().backward()


def test_balancing_supervised_tokens_without_labels_is_refused(tiny_llama: Make) -> None:
    model = adapted(tiny_llama(), balance_tokens="supervised")
    batch = collate(toy_rows(2))
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match=r"balance_tokens 'supervised' needs .* labels of shape \[2, \d+\]"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    assert model(**batch, labels=labels).loss.requires_grad


def test_data_parallel_is_refused(tiny_llama: Make) -> None:
    model = adapted(tiny_llama())
    model.base_model.model._is_replica = True  # as torch.nn.parallel.replicate marks its copies
    with pytest.raises(ValueError, match="torchrun"):
        model(**collate(toy_rows(2)))


@pytest.mark.filterwarnings("ignore:.*torch.compile.*")
def test_a_compiled_model_gets_the_same_gradient(tiny_llama: Make) -> None:
    model, reference = adapted(tiny_llama()), adapted(tiny_llama())
    batch = collate(toy_rows(2))
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**batch).loss
    expected = reference(**batch).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for (name, parameter), other in zip(trainable(model).items(), trainable(reference).values(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_an_optimizer_on_flattened_copies_is_followed_through_accelerate(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's and FSDP's optimizers do not show whose parameters they hold; the next pass then ends the step."""
    monkeypatch.setattr(training, "_optimizer_is_hidden", lambda: True)
    model = adapted(tiny_llama(), balance_group="global_batch")
    state, (batch, *_) = GradientState(), batches(2)
    tokens = int(batch["attention_mask"].sum())
    announced = [False, True, False, True, True, True]
    counts = [0, 0, 2 * tokens, 2 * tokens, 2 * tokens, tokens]
    for last, counted in zip(announced, counts, strict=True):
        state._set_sync_gradients(last)
        model(**batch).loss.backward()
        assert [sum(load) for load in loads_of(model)] == [counted, counted]


def test_image_tokens_are_told_by_their_id(tiny_llama: Make) -> None:
    """As in transformers' vision-language models, whose configuration names the token."""
    (batch, *_) = batches(2)
    image = (batch["input_ids"] % 3 == 0) & batch["attention_mask"].bool()
    batch["input_ids"] = batch["input_ids"].masked_fill(image, 7)
    batch["input_ids"][(batch["input_ids"] == 7) & ~image] = 8
    for tokens in ("text", "stratified"):
        options = {"balance_tokens": tokens, "z_loss_coef": 0.1}
        model, reference = adapted(tiny_llama(), **options), adapted(tiny_llama(), add_balance_loss=False, **options)
        model.get_base_model().config.image_token_id = 7
        mask = batch["attention_mask"].bool()
        expected = reference(**batch).loss + mole_auxiliary_loss(reference, token_mask=mask, image_mask=image)
        torch.testing.assert_close(model(**batch).loss, expected)
        embedded = {key: value for key, value in batch.items() if key != "input_ids"}
        embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ValueError, match=rf"balance_tokens '{tokens}' needs .* input_ids"):
            model(**embedded)
