"""The related methods of docs/related-methods.md as their equations read: loops over tokens and experts, in float64.

Nothing here uses the package. Where a paper and its released code differ, the released code is followed, and the
docstring says so. Dropout and noise are left out: they are zero in evaluation.

Shape legend: B samples, S positions, D hidden size, K experts, k experts a token uses, R rank of an expert, I input
size and O output size of a linear, L layers. A is `[R, I]` and B `[R, O]` (PEFT's lora_B transposed), as in the
package; a base weight is `[O, I]`, a gate `[K, I]`. `s` is the factor on every update, alpha / R unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension."""
    exponentials = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def best(probabilities: Tensor, k: int) -> list[int]:
    """The k experts with the largest probability; the first wins ties."""
    return sorted(range(len(probabilities)), key=lambda expert: -float(probabilities[expert].detach()))[:k]


def renormalised(probabilities: Tensor, k: int) -> dict[int, Tensor]:
    """The k best experts and their probabilities divided by the sum of these k."""
    chosen = best(probabilities, k)
    total = sum(probabilities[expert] for expert in chosen)
    return {expert: probabilities[expert] / total for expert in chosen}


def update(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A x` of one vector x `[I]`."""
    return (a @ x) @ b


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Plain LoRA, `W x + s B A x`, of x `[..., I]`."""
    return x @ weight.T + s * (x @ a.T) @ b


def weighted(x: Tensor, weight: Tensor, weights: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """`y = W x + s sum_k w_k B_k A_k x` for given weights `[B, S, K]`, token by token and expert by expert."""
    y = x @ weight.T
    rows = []
    for sample in range(x.shape[0]):
        for position in range(x.shape[1]):
            token = y[sample, position]
            for expert in range(a.shape[0]):
                share = weights[sample, position, expert]
                token = token + s * share * update(x[sample, position], a[expert], b[expert])
            rows.append(token)
    return torch.stack(rows).view(y.shape)


@dataclass
class Ffn:
    """A gated FFN, `down(silu(gate(x)) * up(x))`, and its LoRA experts: base `[O, I]`, A and B by projection."""

    gate: Tensor
    up: Tensor
    down: Tensor
    a: dict[str, Tensor]
    """`gate`, `up`, `down` -> `[K, R, I]`; `[R, I]` if the experts share A."""
    b: dict[str, Tensor]
    """`gate`, `up`, `down` -> `[K, R, O]`."""

    def token(self, x: Tensor, weights: dict[int, Tensor], s: float) -> Tensor:
        """The FFN of one token x `[D]`, in which each projection adds the experts with these weights."""

        def project(name: str, value: Tensor) -> Tensor:
            y = getattr(self, name) @ value
            for expert, share in weights.items():
                a = self.a[name]
                y = y + s * share * update(value, a if a.dim() == 2 else a[expert], self.b[name][expert])
            return y

        hidden = project("gate", x)
        return project("down", hidden * torch.sigmoid(hidden) * project("up", x))


def hydralora(x: Tensor, weight: Tensor, gate: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """One A `[R, I]`, K matrices B: `y = W x + s sum_k softmax(W_g x)_k B_k A x`. A router in every linear."""
    probabilities = softmax(x @ gate.T)
    return weighted(x, weight, probabilities, a.expand(b.shape[0], *a.shape), b, s)


def asymlora(x: Tensor, ffn: Ffn, gate: Tensor, bias: Tensor, s: float, *, dense: bool) -> tuple[Tensor, Tensor]:
    """An FFN whose experts share A in every projection, under one router; and its probabilities `[B, S, K]`.

    `dense` (the published setting): all experts, with weight p_k. Otherwise: the best expert, with weight 1, so the
    language-model loss gives the router no gradient.
    """
    probabilities = softmax(x @ gate.T + bias)
    one = torch.ones((), dtype=x.dtype)
    rows = []
    for sample in range(x.shape[0]):
        for position in range(x.shape[1]):
            p = probabilities[sample, position]
            weights = dict(enumerate(p)) if dense else {best(p, 1)[0]: one}
            rows.append(ffn.token(x[sample, position], weights, s))
    return torch.stack(rows).view(x.shape), probabilities


def asymlora_balance(probabilities: Sequence[Tensor], mask: Tensor, coefficient: float = 0.05) -> Tensor:
    """`coefficient * mean over samples of sum_k f_k P_k`, over the tokens of all layers of a sample together.

    f is the share of tokens whose largest probability is k (a constant), P the mean probability; in dense mode too.
    `probabilities` has `[B, S, K]` for each layer; `mask` `[B, S]` is false at padding.
    """
    total = torch.zeros((), dtype=probabilities[0].dtype)
    for sample in range(mask.shape[0]):
        tokens = [layer[sample, position] for layer in probabilities for position in mask[sample].nonzero().flatten()]
        experts = len(tokens[0])
        for expert in range(experts):
            share = sum(best(p, 1)[0] == expert for p in tokens) / len(tokens)
            total = total + share * sum(p[expert] for p in tokens) / len(tokens)
    return coefficient * total / mask.shape[0]


def coin_moelora(x: Tensor, weight: Tensor, gate: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """CoIN's MoELoRA: rank r split into K experts of rank r / K, all weighted by a softmax per token and linear.

    `y = W x + (alpha / r) sum_k softmax(W_g x)_k B_k A_k x`, where r = K R is the whole rank. No balance loss.
    """
    return weighted(x, weight, softmax(x @ gate.T), a, b, alpha / (a.shape[0] * a.shape[1]))


def moelora_task(
    x: Tensor,
    weight: Tensor,
    tasks: Sequence[Sequence[int]],
    embedding: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: float,
) -> Tensor:
    """The layer of `coin_moelora` with weights that depend on the sample's task only, the same in all layers.

    `w = softmax(G e)`, where e is the embedding of the sample's task, or the mean over its tasks; task 0 is padding in
    a list of several. `embedding` is `[number of tasks + 1, E]`, `gate` `[K, E]`.
    """
    rows = []
    for ids in tasks:
        counted = list(ids) if len(ids) == 1 else [task for task in ids if task > 0]
        rows.append(softmax(gate @ torch.stack([embedding[task] for task in counted]).mean(dim=0)))
    weights = torch.stack(rows).unsqueeze(1).expand(-1, x.shape[1], -1)
    return weighted(x, weight, weights, a, b, alpha / (a.shape[0] * a.shape[1]))


def loramoe(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    s: float,
    task_types: Sequence[int],
    *,
    delta: float,
    coefficient: float,
) -> tuple[Tensor, Tensor]:
    """LoRAMoE's linear and its balance loss; those of all linears and layers are added up.

    `y = W x + s sum_k softmax(W_g x)_k B_k A_k x`. Loss: `coefficient * var(Z) / (mean(Z)^2 + 1e-10)` over all B K
    entries of `Z = I * Q` with the unbiased variance. `I[n, k] = sum_t p_k(x_t)` is expert k's importance for sample n.
    `Q[n, k]` is `1 + delta` if the expert's group matches the sample's type, and `1 - delta` if not: the first K / 2
    experts are for type 1, the others for type 0. The released code counts every position, padding too.
    """
    probabilities = softmax(x @ gate.T)
    experts = gate.shape[0]
    z = []
    for sample, kind in enumerate(task_types):
        for expert in range(experts):
            importance = sum(probabilities[sample, position, expert] for position in range(x.shape[1]))
            matches = kind == (1 if expert < experts // 2 else 0)
            z.append(importance * (1 + delta if matches else 1 - delta))
    mean = sum(z) / len(z)
    variance = sum((value - mean) ** 2 for value in z) / (len(z) - 1)
    loss = coefficient * variance / (mean**2 + 1e-10)
    return weighted(x, weight, probabilities, a, b, s), loss


def mocle(
    x: Tensor,
    weight: Tensor,
    clusters: Sequence[int],
    embedding: Tensor,
    gate: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    universal: tuple[Tensor, Tensor],
    s: float,
    temperature: float,
) -> Tensor:
    """MoCLE's linear: the best expert for the sample's cluster, and a universal expert with the remaining weight.

    `p = softmax((G e_c + g) / tau)`, k = argmax p: `y = W x + s (p_k^2 B_k A_k x + (1 - p_k) B_u A_u x)`. The square is
    the released code's: its dispatcher multiplies the expert by its gate p_k, and the layer by p_k once more.
    `embedding` is `[C, E]`, `gate` `[K, E]`, `bias` `[K]`. Every linear has its own embedding and gate.
    """
    y = x @ weight.T
    rows = []
    for sample, cluster in enumerate(clusters):
        p = softmax((gate @ embedding[cluster] + bias) / temperature)
        k = best(p, 1)[0]
        for position in range(x.shape[1]):
            token = x[sample, position]
            expert, common = update(token, a[k], b[k]), update(token, *universal)
            rows.append(y[sample, position] + s * (p[k] ** 2 * expert + (1 - p[k]) * common))
    return torch.stack(rows).view(y.shape)


def octavius_weights(prompts: Sequence[Tensor], gate: Tensor) -> Tensor:
    """The weights `[B, K]` of all layers: one gate for the model, on the token embeddings of each sample's prompt.

    `p = softmax(mean over prompt tokens of W_g e_t)`; the two best experts, divided by their sum. `prompts` has the
    embeddings `[n, D]` of the first user turn of each sample, without images and without padding (the released code
    averages over the padding of a batch as well). The code's random drop of the second expert has no effect.
    """
    rows = []
    for embeddings in prompts:
        logits = sum(gate @ token for token in embeddings) / len(embeddings)
        weights = torch.zeros(gate.shape[0], dtype=gate.dtype)
        for expert, share in renormalised(softmax(logits), 2).items():
            weights = weights + share * torch.eye(gate.shape[0], dtype=gate.dtype)[expert]
        rows.append(weights)
    return torch.stack(rows)


def octavius(x: Tensor, weight: Tensor, weights: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y = W x + sum_k w_k B_k A_k x` with the weights `[B, K]` of `octavius_weights`. The code has no alpha / r."""
    return weighted(x, weight, weights.unsqueeze(1).expand(-1, x.shape[1], -1), a, b, 1.0)


def mixlora(x: Tensor, ffn: Ffn, gate: Tensor, s: float, top_k: int = 2) -> tuple[Tensor, Tensor]:
    """MixLoRA's FFN: an expert is the whole FFN with a LoRA of its own; and its logits `[B, S, K]`.

    `y = sum_{k in top} (p_k / sum of the chosen p) FFN_k(x)`: the experts are mixed after the down projection.
    """
    logits = x @ gate.T
    one = torch.ones((), dtype=x.dtype)
    rows = []
    for sample in range(x.shape[0]):
        for position in range(x.shape[1]):
            shares = renormalised(softmax(logits[sample, position]), top_k)
            rows.append(sum(share * ffn.token(x[sample, position], {k: one}, s) for k, share in shares.items()))
    return torch.stack(rows).view(x.shape), logits


def mixlora_balance(logits: Sequence[Tensor], mask: Tensor, top_k: int = 2, coefficient: float = 1e-3) -> Tensor:
    """`coefficient * K sum_k f_k P_k` over the tokens of all layers and samples together, without padding.

    f_k is the number of choices of expert k over the number of tokens, so f sums to `top_k` (Mixtral's loss).
    `logits` has `[B, S, K]` for each layer; `mask` `[B, S]`.
    """
    tokens = [softmax(layer[tuple(place)]) for layer in logits for place in mask.nonzero()]
    experts = len(tokens[0])
    total = torch.zeros((), dtype=tokens[0].dtype)
    for expert in range(experts):
        share = sum(expert in best(p, top_k) for p in tokens) / len(tokens)
        total = total + share * sum(p[expert] for p in tokens) / len(tokens)
    return coefficient * experts * total


def mola(
    x: Tensor, weight: Tensor, gate: Tensor, a: Tensor, b: Tensor, s: float, top_k: int = 2
) -> tuple[Tensor, Tensor]:
    """MoLA's linear: `y = W x + s sum_{k in top} (p_k / sum of the chosen p) B_k A_k x`; and its logits `[B, S, K]`.

    A router in every linear; K may differ by layer.
    """
    logits = x @ gate.T
    weights = torch.zeros_like(logits)
    for sample in range(x.shape[0]):
        for position in range(x.shape[1]):
            for expert, share in renormalised(softmax(logits[sample, position]), top_k).items():
                weights[sample, position, expert] = share
    return weighted(x, weight, weights, a, b, s), logits


def mola_balance(logits: Sequence[Sequence[Tensor]], top_k: int = 2, coefficient: float = 1e-3) -> Tensor:
    """`coefficient * sum over layers of K sum_k f_k P_k`, over the tokens of all linears of a layer together.

    f_k is expert k's share of all choices, so f sums to 1. Every position counts, padding too. `logits` has
    `[B, S, K]` for each linear of each layer.
    """
    total = torch.zeros((), dtype=logits[0][0].dtype)
    for layer in logits:
        tokens = [softmax(row) for linear in layer for row in linear.flatten(0, 1)]
        experts = len(tokens[0])
        for expert in range(experts):
            share = sum(expert in best(p, top_k) for p in tokens) / (top_k * len(tokens))
            total = total + experts * share * sum(p[expert] for p in tokens) / len(tokens)
    return coefficient * total


def molora(x: Tensor, weight: Tensor, gate: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """MoLoRA's linear: `y = W x + s sum_k softmax(W_g x)_k B_k A_k x`. A router in every linear, no balance loss."""
    return weighted(x, weight, softmax(x @ gate.T), a, b, s)
