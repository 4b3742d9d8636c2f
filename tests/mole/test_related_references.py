"""The references of the related methods: limits in which they are plain LoRA, published sizes, minima of the losses."""

from typing import Any

import pytest
import torch
from mole import related_references as ref
from torch import Tensor

from llava_mole.mole.loss import balance_loss
from llava_mole.mole.routing import Routing

B, S, D, H, K, R = 2, 5, 8, 12, 4, 3
SCALE = 1.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def linear() -> dict[str, Tensor]:
    """A linear of D to H with K different experts, a gate, and an input."""
    return {
        "x": draw(B, S, D),
        "weight": draw(H, D, seed=1),
        "gate": draw(K, D, seed=2),
        "a": draw(K, R, D, seed=3),
        "b": draw(K, R, H, seed=4),
    }


def equal_experts(linear: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with K copies of expert 0."""
    return {**linear, **{key: linear[key][:1].expand_as(linear[key]) for key in "ab"}}


def plain(linear: dict[str, Tensor], expert: int, s: float) -> Tensor:
    return ref.lora(linear["x"], linear["weight"], linear["a"][expert], linear["b"][expert], s)


def decided(linear: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    """The same with a gate that gives every token of this input to one expert."""
    direction = torch.linalg.pinv(linear["x"].flatten(0, 1)[:D]) @ torch.ones(D, dtype=torch.float64)
    x = linear["x"].flatten(0, 1)[:D].view(1, D, D)
    gate = torch.zeros(K, D, dtype=torch.float64)
    gate[expert] = 200 * direction
    return {**linear, "x": x, "gate": gate}


def run(method: str, linear: dict[str, Tensor]) -> Tensor:
    """The output of a method that routes tokens in every linear, at factor SCALE on an update."""
    rank = K * R
    if method == "hydralora":
        return ref.hydralora(**{**linear, "a": linear["a"][0]}, s=SCALE)
    if method == "coin_moelora":
        return ref.coin_moelora(**linear, alpha=SCALE * rank)
    if method == "loramoe":
        return ref.loramoe(**linear, s=SCALE, task_types=[0] * len(linear["x"]), delta=0.1, coefficient=0.1)[0]
    if method == "mola":
        return ref.mola(**linear, s=SCALE)[0]
    return ref.molora(**linear, s=SCALE)


TOKEN_ROUTED = ("hydralora", "coin_moelora", "loramoe", "mola", "molora")


@pytest.mark.parametrize("method", TOKEN_ROUTED)
def test_equal_experts_are_plain_lora(method: str, linear: dict[str, Tensor]) -> None:
    same = equal_experts(linear)
    torch.testing.assert_close(run(method, same), plain(same, 0, SCALE))
    assert not torch.allclose(run(method, linear), plain(linear, 0, SCALE))


@pytest.mark.parametrize("method", TOKEN_ROUTED)
def test_a_decided_gate_gives_one_expert(method: str, linear: dict[str, Tensor]) -> None:
    one = decided(linear, 2)
    expected = one if method != "hydralora" else {**one, "a": one["a"][:1].expand_as(one["a"])}
    torch.testing.assert_close(run(method, one), plain(expected, 2, SCALE))


def test_hydralora_is_molora_with_one_a(linear: dict[str, Tensor]) -> None:
    shared = {**linear, "a": linear["a"][:1].expand_as(linear["a"])}
    torch.testing.assert_close(run("hydralora", linear), run("molora", shared))
    parameters = R * D + K * R * H + K * D
    assert linear["a"][0].numel() + linear["b"].numel() + linear["gate"].numel() == parameters


def test_experts_of_a_split_rank_cost_what_one_lora_costs(linear: dict[str, Tensor]) -> None:
    """CoIN's and MOELoRA's point: K experts of rank r / K. At a uniform gate they are one LoRA of rank r, over K."""
    rank = K * R
    assert linear["a"].numel() + linear["b"].numel() == rank * (D + H)
    uniform = {**linear, "gate": torch.zeros(K, D, dtype=torch.float64)}
    stacked = ref.lora(linear["x"], linear["weight"], linear["a"].flatten(0, 1), linear["b"].flatten(0, 1), SCALE / K)
    torch.testing.assert_close(run("coin_moelora", uniform), stacked)


def test_moelora_weighs_by_task(linear: dict[str, Tensor]) -> None:
    layer: dict[str, Any] = {key: linear[key] for key in ("x", "weight", "a", "b")}
    embedding, gate = draw(4, 6), draw(K, 6, seed=1)
    alpha = SCALE * K * R
    same = {**layer, **{key: equal_experts(linear)[key] for key in "ab"}}
    equal = ref.moelora_task(**same, tasks=[[1], [2]], embedding=embedding, gate=gate, alpha=alpha)
    torch.testing.assert_close(equal, plain(equal_experts(linear), 0, SCALE))
    first = ref.moelora_task(**layer, tasks=[[1], [2]], embedding=embedding, gate=gate, alpha=alpha)
    second = ref.moelora_task(**layer, tasks=[[1], [3]], embedding=embedding, gate=gate, alpha=alpha)
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    several = ref.moelora_task(**layer, tasks=[[1, 0], [2, 2]], embedding=embedding, gate=gate, alpha=alpha)
    torch.testing.assert_close(several, first)


def test_loramoe_balances_towards_its_groups(linear: dict[str, Tensor]) -> None:
    """The loss is 0 where importance times Q is the same everywhere, and prefers matching groups otherwise."""
    layer = {**linear, "gate": torch.zeros(K, D, dtype=torch.float64)}
    given = {"s": SCALE, "coefficient": 0.3}
    assert ref.loramoe(**layer, **given, task_types=[1, 0], delta=0.0)[1] == pytest.approx(0, abs=1e-12)
    uniform = float(ref.loramoe(**layer, **given, task_types=[1, 0], delta=0.2)[1])
    values = torch.tensor([1.2, 0.8] * (B * K // 2), dtype=torch.float64)
    assert uniform == pytest.approx(0.3 * float(values.var() / values.mean() ** 2), abs=1e-9)

    x = torch.ones(1, S, D, dtype=torch.float64)
    leaning = torch.zeros(K, D, dtype=torch.float64)
    leaning[: K // 2] = torch.log(torch.tensor(1.5, dtype=torch.float64)) / D  # 1.2 to 0.8: what delta 0.2 evens out
    for kind, expected in ((0, 0.0), (1, None)):
        loss = float(ref.loramoe(**{**layer, "x": x, "gate": leaning}, **given, task_types=[kind], delta=0.2)[1])
        assert loss == pytest.approx(expected, abs=1e-9) if expected is not None else loss > 0.01


def test_mocle_shares_between_an_expert_and_the_universal_one(linear: dict[str, Tensor]) -> None:
    layer: dict[str, Any] = {key: linear[key] for key in ("x", "weight", "a", "b")}
    universal = (draw(R, D, seed=8), draw(R, H, seed=9))
    embedding, bias = torch.eye(3, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    gate = torch.zeros(K, 3, dtype=torch.float64)
    gate[2, 0], gate[1, 1] = 100.0, 100.0
    given = {"embedding": embedding, "bias": bias, "universal": universal, "s": SCALE, "temperature": 0.05}
    y = ref.mocle(**layer, **given, gate=gate, clusters=[0, 1])
    for sample, expert in enumerate((2, 1)):
        torch.testing.assert_close(y[sample], plain(linear, expert, SCALE)[sample])
    undecided = ref.mocle(**layer, **given, gate=torch.zeros_like(gate), clusters=[0, 1])
    base = linear["x"] @ linear["weight"].T
    common = ref.lora(linear["x"], linear["weight"], *universal, SCALE) - base
    expert = plain(linear, 0, SCALE) - base
    torch.testing.assert_close(undecided, base + expert / K**2 + common * (1 - 1 / K))


def test_octavius_has_one_decision_for_the_whole_sample(linear: dict[str, Tensor]) -> None:
    prompts = [draw(3, D, seed=5), draw(6, D, seed=6)]
    weights = ref.octavius_weights(prompts, linear["gate"])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B, dtype=torch.float64))
    assert (weights > 0).sum(dim=1).tolist() == [2, 2]
    order = ref.octavius_weights([prompts[0].flip(0), prompts[1]], linear["gate"])
    torch.testing.assert_close(order, weights)
    layer = {key: linear[key] for key in ("x", "weight", "a", "b")}
    y = ref.octavius(**layer, weights=weights)
    base = linear["x"] @ linear["weight"].T
    expected = sum(weights[:, expert, None, None] * (plain(linear, expert, 1.0) - base) for expert in range(K))
    torch.testing.assert_close(y, base + expected)
    same = {key: equal_experts(linear)[key] for key in ("x", "weight", "a", "b")}
    torch.testing.assert_close(ref.octavius(**same, weights=weights), plain(equal_experts(linear), 0, 1.0))


def make_ffn(*, shared_a: bool, equal: bool = False) -> ref.Ffn:
    widths = {"gate": (D, H), "up": (D, H), "down": (H, D)}
    base = {name: draw(out, inner, seed=n) for n, (name, (inner, out)) in enumerate(widths.items())}
    a = {name: draw(K, R, inner, seed=10 + n) for n, (name, (inner, _)) in enumerate(widths.items())}
    b = {name: draw(K, R, out, seed=20 + n) for n, (name, (_, out)) in enumerate(widths.items())}
    if equal:
        a, b = ({name: value[:1].expand_as(value) for name, value in half.items()} for half in (a, b))
    return ref.Ffn(**base, a={name: value[0] for name, value in a.items()} if shared_a else a, b=b)


def ffn_with_lora(ffn: ref.Ffn, x: Tensor, expert: int) -> Tensor:
    """The FFN in which every projection has the plain LoRA of one expert."""

    def project(name: str, value: Tensor) -> Tensor:
        a = ffn.a[name] if ffn.a[name].dim() == 2 else ffn.a[name][expert]
        return ref.lora(value, getattr(ffn, name), a, ffn.b[name][expert], SCALE)

    return project("down", torch.nn.functional.silu(project("gate", x)) * project("up", x))


@pytest.mark.parametrize("method", ["asymlora dense", "asymlora sparse", "mixlora"])
def test_ffns_with_equal_experts_are_ffns_with_plain_lora(method: str) -> None:
    x, gate, bias = draw(B, S, D), draw(K, D, seed=2), draw(K, seed=3)
    ffn = make_ffn(shared_a="asymlora" in method, equal=True)
    different = make_ffn(shared_a="asymlora" in method)

    def compute(ffn: ref.Ffn) -> Tensor:
        if method == "mixlora":
            return ref.mixlora(x, ffn, gate, SCALE)[0]
        return ref.asymlora(x, ffn, gate, bias, SCALE, dense="dense" in method)[0]

    torch.testing.assert_close(compute(ffn), ffn_with_lora(ffn, x, 0))
    assert not torch.allclose(compute(different), ffn_with_lora(different, x, 0))


def test_mixlora_mixes_at_the_output_and_not_in_the_projections() -> None:
    x, gate, ffn = draw(B, S, D), draw(K, D, seed=2), make_ffn(shared_a=False)
    y, logits = ref.mixlora(x, ffn, gate, SCALE)
    probs = logits.softmax(dim=-1)
    top = probs.topk(2, dim=-1)
    shares = torch.zeros_like(probs).scatter(-1, top.indices, top.values / top.values.sum(dim=-1, keepdim=True))
    expected = sum(shares[..., k : k + 1] * ffn_with_lora(ffn, x, k) for k in range(K))
    torch.testing.assert_close(y, expected)
    inside = torch.stack(
        [ffn.token(x[b, s], dict(enumerate(shares[b, s])), SCALE) for b in range(B) for s in range(S)]
    ).view(B, S, D)
    assert not torch.allclose(y, inside, atol=1e-3)
    top_1 = ref.mixlora(x, ffn, gate, SCALE, top_k=1)[0]
    chosen = probs.argmax(dim=-1)
    one = torch.stack([ffn_with_lora(ffn, x[b, s], int(chosen[b, s])) for b in range(B) for s in range(S)])
    torch.testing.assert_close(top_1, one.view(B, S, D))


def test_the_published_size_of_mixlora() -> None:
    """2.9 % of Llama-2-7B (the table in its README): r 16, 8 experts in the FFN, LoRA on q, k, v, o."""
    hidden, ffn, layers, base = 4096, 11008, 32, 6_738_415_616
    rank, experts = 16, 8
    attention = 4 * rank * 2 * hidden
    expert = rank * 3 * (hidden + ffn)
    added = layers * (attention + experts * expert + experts * hidden)
    assert added / (base + added) == pytest.approx(0.029, abs=5e-4)


def test_the_size_of_mola_follows_from_experts_by_layer() -> None:
    """2, 4, 6 and 8 experts on a quarter of the layers each cost what 5 on every layer cost."""
    hidden, ffn, rank = 4096, 11008, 8
    widths = [(hidden, hidden)] * 4 + [(hidden, ffn)] * 2 + [(ffn, hidden)]

    def size(experts: int) -> int:
        return sum(experts * (rank * (inner + out) + inner) for inner, out in widths)

    by_layer = [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert sum(map(size, by_layer)) == 32 * size(5)


def uniform_and_skewed() -> tuple[Tensor, Tensor]:
    """Logits `[B, S, K]` that are equal, and that all favour expert 1."""
    skewed = torch.zeros(B, S, K, dtype=torch.float64)
    skewed[..., 1] = 3.0
    return torch.zeros(B, S, K, dtype=torch.float64), skewed


def test_balance_losses_at_a_uniform_and_a_skewed_gate() -> None:
    uniform, skewed = uniform_and_skewed()
    mask = torch.ones(B, S, dtype=torch.bool)
    p = float(skewed[0, 0].softmax(-1)[1])
    rest = (1 - p) / (K - 1)
    # AsymLoRA: sum f P is 1 / K at uniform probabilities whatever is chosen, and p if all tokens choose expert 1.
    assert ref.asymlora_balance([uniform.softmax(-1)] * 2, mask) == pytest.approx(0.05 / K)
    assert ref.asymlora_balance([skewed.softmax(-1)] * 2, mask) == pytest.approx(0.05 * p)
    # MixLoRA: times K, and f sums to 2.
    assert ref.mixlora_balance([uniform] * 3, mask, coefficient=1.0) == pytest.approx(2.0)
    assert ref.mixlora_balance([skewed] * 3, mask, coefficient=1.0) == pytest.approx(K * (p + rest))
    # MoLA: f sums to 1, and layers are added up.
    assert ref.mola_balance([[uniform] * 2] * 3, coefficient=1.0) == pytest.approx(3.0)
    assert ref.mola_balance([[skewed] * 2] * 3, coefficient=1.0) == pytest.approx(3 * K * (p + rest) / 2)


def test_balance_losses_pool_and_mask_as_their_codes_do() -> None:
    _, skewed = uniform_and_skewed()
    other = skewed.roll(1, dims=-1)
    mask = torch.ones(B, S, dtype=torch.bool)
    half = mask.clone()
    half[:, S // 2 :] = False
    padded = skewed.clone()
    padded[:, S // 2 :] = other[:, S // 2 :]
    # Padding: left out by AsymLoRA and MixLoRA, counted by MoLA.
    assert ref.asymlora_balance([padded.softmax(-1)], half) == ref.asymlora_balance([skewed.softmax(-1)], half)
    assert ref.mixlora_balance([padded], half) == ref.mixlora_balance([skewed], half)
    assert ref.mola_balance([[padded]]) != ref.mola_balance([[skewed]])
    # Layers of opposite preference cancel where they are pooled, and do not in MoLA, which adds them up.
    pooled = ref.mixlora_balance([skewed, other], mask), ref.mixlora_balance([skewed], mask)
    assert pooled[0] < pooled[1]
    assert ref.mola_balance([[skewed], [other]]) == pytest.approx(2 * float(ref.mola_balance([[skewed]])))
    # Samples of opposite preference cancel in MixLoRA, and not in AsymLoRA, which balances each sample.
    crossed = torch.stack([skewed[0], other[1]])
    assert ref.mixlora_balance([crossed], mask) < ref.mixlora_balance([skewed], mask)
    assert ref.asymlora_balance([crossed.softmax(-1)], mask) == pytest.approx(
        float(ref.asymlora_balance([skewed.softmax(-1)], mask))
    )


def test_the_balance_loss_of_the_package_expresses_those_of_asymlora_and_mixlora() -> None:
    logits = [draw(B, S, K, seed=n) for n in range(3)]
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 3:] = False

    def routing(top_k: int) -> Routing:
        index = tuple(layer.topk(top_k, dim=-1).indices for layer in logits)
        return Routing(("0", "1", "2"), tuple(logits), index, ())

    probabilities = [layer.softmax(dim=-1) for layer in logits]
    ours = 0.05 * balance_loss(routing(1), mask, scale="mean", layers="pooled", group="sample")
    torch.testing.assert_close(ours, ref.asymlora_balance(probabilities, mask))
    # f sums to 1 in the package and to the number of choices in MixLoRA.
    ours = 2e-3 * balance_loss(routing(2), mask, scale="switch", layers="pooled", group="micro_batch")
    torch.testing.assert_close(ours, ref.mixlora_balance(logits, mask))
