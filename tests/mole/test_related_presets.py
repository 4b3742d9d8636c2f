"""The presets of the related methods: outputs, gradients and losses of their references, and a life from end to end."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mole import related_references as ref
from mole.preset_cases import (
    IDS,
    KINDS,
    NOT_RELATED,
    ONES,
    PADDED,
    PROMPT,
    SMALL,
    TASKS,
    Make,
    Randomize,
    config_of,
    make,
    run,
)
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from llava_mole.mole import PRESETS, ExpertLayer, MoleExpertLinear, collect_routing, set_routing_inputs
from llava_mole.mole import mole_auxiliary_loss as auxiliary_loss


def pair(layer: ExpertLayer, name: str = "linear") -> tuple[Tensor, Tensor]:
    a, b = layer.experts("default").pair(name)
    return (a[0] if layer.configs["default"].shared_a else a), b


def ffn_of(layer: ExpertLayer) -> ref.Ffn:
    pairs = {name: pair(layer, f"{name}_proj") for name in ("gate", "up", "down")}
    weights = {name: getattr(layer.base_layer, f"{name}_proj").weight for name in pairs}
    return ref.Ffn(**weights, a={n: a for n, (a, _) in pairs.items()}, b={n: b for n, (_, b) in pairs.items()})


def reference(case: str, model: nn.Module, layer: ExpertLayer, x: Tensor) -> Tensor:
    """What the method computes for the input `x` of one of its layers."""
    config = layer.configs["default"]
    s, router = config.scaling, layer.router("default")
    if case in ("asymlora", "asymlora sparse"):
        dense = case == "asymlora"
        return ref.asymlora(x, ffn_of(layer), router.weight, router.bias, s, dense=dense)[0]
    if case == "mixlora":
        return ref.mixlora(x, ffn_of(layer), router.weight, s)[0]
    (a, b), weight = pair(layer), layer.base_layer.weight
    if case in ("moelora-task", "octavius"):
        owner = next(m for m in model.modules() if isinstance(m, ExpertLayer) and m.router("default") is not None)
        router = owner.router("default")
    if case == "hydralora":
        return ref.hydralora(x, weight, router.weight, a, b, s)
    if case == "coin-moelora":
        return ref.coin_moelora(x, weight, router.weight, a, b, s * a.shape[0] * a.shape[1])
    if case == "moelora-task":
        alpha = s * a.shape[0] * a.shape[1]
        tasks = [[int(task)] for task in TASKS]
        return ref.moelora_task(x, weight, tasks, router.embedding, router.weight, a, b, alpha)
    if case == "loramoe":
        return ref.loramoe(x, weight, router.weight, a, b, s, KINDS.tolist(), delta=0.2, coefficient=0.3)[0]
    if case == "mocle":
        universal = layer.experts("default").shared_pair("linear")
        gate = (router.embedding, router.weight, router.bias)
        return ref.mocle(x, weight, TASKS.tolist(), *gate, a, b, universal, s, config.temperature)
    if case == "octavius":
        embedded = model.get_input_embeddings()(IDS)
        return ref.octavius(x, weight, ref.octavius_weights([e[p] for e, p in zip(embedded, PROMPT, strict=True)],
                                                            router.weight), a, b)  # fmt: skip
    if case == "mola":
        return ref.mola(x, weight, router.weight, a, b, s)[0]
    return ref.molora(x, weight, router.weight, a, b, s)


def assert_same_gradients(model: nn.Module, own: Tensor, expected: Tensor, more: list[Tensor]) -> None:
    """Equal gradients of two scalars with respect to every adapter parameter and the tensors in `more`."""
    names, leaves = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    grads = [torch.autograd.grad(v, [*leaves, *more], retain_graph=True, allow_unused=True) for v in (own, expected)]
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in grads[1])
    for name, got, want in zip([*names, *["input"] * len(more)], *grads, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        got, want = (zero if g is None else g for g in (got, want))
        torch.testing.assert_close(got.expand_as(want) if got.dim() == 0 else got, want.expand_as(got), rtol=1e-8,
                                   atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "masked", "grouped", "loop"])
@pytest.mark.parametrize("case", SMALL)
def test_outputs_and_gradients_equal_the_reference(
    case: str, backend: str, tiny_llama: Make, randomized: Randomize
) -> None:
    model = make(config_of(case, backend=backend), tiny_llama, randomized)
    seen = run(model)
    attention = [name for name in seen if "self_attn" in name]
    ffn = [name for name in seen if "mlp" in name]
    for name in [*attention[:1], *attention[-1:], *ffn[:1], *ffn[-1:]]:  # in the first and in the last layer
        layer, (x, own) = model.get_submodule(name), seen[name]
        expected = reference(case, model, layer, x)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
        base = layer.base_layer(x)
        assert (own - base).abs().max() > 1e-3
        probe = torch.randn(own.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert_same_gradients(model, (own * probe).sum(), (expected * probe).sum(), [x] if x.requires_grad else [])


def test_every_related_preset_has_its_place(tiny_llama: Make) -> None:
    assert {case.split()[0] for case in SMALL} == set(PRESETS) - set(NOT_RELATED)
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    places = {
        **dict.fromkeys(("hydralora", "loramoe"), seven[4:]),
        **dict.fromkeys(("coin-moelora", "moelora-task", "mola", "molora"), seven),
        "mocle": ["q_proj", "v_proj"],
        "octavius": seven[:4],
        "asymlora": ["mlp"],
        "mixlora": ["mlp"],
    }
    for name, expected in places.items():
        model = get_peft_model(tiny_llama(), config_of(name))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, ExpertLayer)}
        assert [n.rpartition(".")[-1] for n in layers if "layers.1." in n] == expected
        routers = [n for n, m in layers.items() if m.router("default") is not None]
        assert len(routers) == (1 if name in ("octavius", "moelora-task") else len(layers))
        plain = [n for n, _ in model.named_parameters() if "mole_lora" in n and "layers.1." in n]
        assert len(plain) == (8 if name in ("asymlora", "mixlora") else 0)
        assert all(isinstance(m, MoleExpertLinear) for m in layers.values()) == (expected != ["mlp"])


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_asymlora(padded: bool, tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("asymlora"), tiny_llama, randomized)
    mask = PADDED if padded else ONES
    seen = run(model, mask)
    probabilities = []
    for name, (x, _) in seen.items():
        layer = model.get_submodule(name)
        router = layer.router("default")
        probabilities.append(ref.asymlora(x, ffn_of(layer), router.weight, router.bias, 1.0, dense=True)[1])
    check_loss(model, mask, ref.asymlora_balance(probabilities, mask.bool()))


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_of_mixlora(padded: bool, tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("mixlora"), tiny_llama, randomized)
    mask = PADDED if padded else ONES
    seen = run(model, mask)
    logits = [x @ model.get_submodule(name).router("default").weight.T for name, (x, _) in seen.items()]
    check_loss(model, mask, ref.mixlora_balance(logits, mask.bool()))


def test_the_loss_of_mola(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("mola"), tiny_llama, randomized)
    seen = run(model)
    layers: dict[str, list[Tensor]] = {}
    for name, (x, _) in seen.items():
        logits = x @ model.get_submodule(name).router("default").weight.T
        layers.setdefault(name.split("layers.")[1][0], []).append(logits)
    assert [len(linears) for linears in layers.values()] == [7, 7]
    assert [linears[0].shape[-1] for linears in layers.values()] == [3, 5]
    check_loss(model, ONES, ref.mola_balance(list(layers.values())))


def test_the_loss_of_loramoe(tiny_llama: Make, randomized: Randomize) -> None:
    model = make(config_of("loramoe"), tiny_llama, randomized)
    total: Any = 0
    for name, (x, _) in run(model).items():
        layer = model.get_submodule(name)
        given = (x, layer.base_layer.weight, layer.router("default").weight, *pair(layer), 1.0, KINDS.tolist())
        total = total + ref.loramoe(*given, delta=0.2, coefficient=0.3)[1]
    check_loss(model, ONES, total)


def check_loss(model: nn.Module, mask: Tensor, expected: Tensor) -> None:
    own = auxiliary_loss(model, token_mask=mask.bool())
    torch.testing.assert_close(own, expected)
    assert_same_gradients(model, own, expected, [])


@pytest.mark.parametrize("case", [case for case in SMALL if " " not in case])
def test_it_trains_saves_loads_and_generates(case: str, tiny_llama: Make, tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs = {"task": TASKS, "prompt_mask": PROMPT, "source": KINDS}
    model = get_peft_model(tiny_llama(), config_of(case, dropout=PRESETS[case].get("dropout", 0.0)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    set_routing_inputs(model, **inputs)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n: bool((p != before[n]).any()) for n, p in model.named_parameters() if n in before}
    assert all(moved.values()), [n for n, m in moved.items() if not m]
    assert any("mole_router" in name for name in before)
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for each in (model, again):
        set_routing_inputs(each, task=TASKS, source=KINDS)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": ONES}
    answers = model.generate(IDS, **arguments)
    assert torch.equal(again.generate(IDS, **arguments), answers)
    assert torch.equal(model.generate(IDS, use_cache=False, **arguments), answers) or case == "octavius"
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    base = tiny_llama().eval()
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, base(IDS).logits)
        assert collect_routing(again).logits == ()
    assert torch.equal(again.unload()(IDS).logits, base(IDS).logits)


def test_the_table_of_the_docs_is_that_of_the_presets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "related-methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text.split("## Presets")[1].split("Where they differ")[0], re.M)
    values = {
        name: {key: ast.literal_eval(value) for key, value in re.findall(r"`(\w+)=(.*?)`", options)}
        for name, options in rows
    }
    assert values == {name: options for name, options in PRESETS.items() if name not in NOT_RELATED}


def test_every_related_preset_has_a_section_of_the_docs_with_its_source() -> None:
    text = (Path(__file__).parents[2] / "docs" / "related-methods.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n([\s\S]*?)(?=^## |\Z)", text, re.M))
    names = {re.sub(r"[^a-z]", "", title.lower()): title for title in sections}
    for preset in PRESETS.keys() - NOT_RELATED:
        name = {"moelora-task": "moelorabytask"}.get(preset, re.sub(r"[^a-z]", "", preset))
        body = sections[names[name]]
        assert all(body.count(f"- {entry}: ") == 1 for entry in ("Routed", "Source")), preset
        assert body.startswith("\n")
        assert body.endswith("\n\n")
