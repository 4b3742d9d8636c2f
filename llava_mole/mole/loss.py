"""The balance loss (Eq. 6-8) in all its readings, and the z-loss: pure functions of logits, choices and masks.

Shape legend: L layers, B samples, S positions, K experts, k experts a token uses, M token sets.
"""

import torch
from torch import Tensor

from llava_mole.common.errors import ConfigError
from llava_mole.mole.record import Routing


def token_sets(
    which: str, token_mask: Tensor, supervised_mask: Tensor | None = None, image_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The bool masks `[B, S]` over which `balance_tokens=which` balances; two (image, text) for `stratified`.

    Raises:
        ConfigError: the choice needs a mask that was not given.
    """
    if which == "all":
        return (token_mask,)
    if which == "supervised":
        if supervised_mask is None:
            raise ConfigError("balance_tokens 'supervised' needs supervised_mask")
        return (token_mask & supervised_mask,)
    if image_mask is None:
        raise ConfigError(f"balance_tokens {which!r} needs image_mask")
    text = token_mask & ~image_mask
    return (text,) if which == "text" else (token_mask & image_mask, text)


def choice_counts(routing: Routing, mask: Tensor) -> Tensor:
    """Tokens of `mask` (bool `[B, S]`) that use each expert, int64 `[L, B, K]`."""
    index = torch.stack(routing.index)
    counts = torch.zeros(*index.shape[:2], routing.num_experts, dtype=torch.int64, device=index.device)
    ones = mask.to(torch.int64).unsqueeze(-1).expand(index.shape[1:]).flatten(1)
    return counts.scatter_add_(-1, index.flatten(2), ones.unsqueeze(0).expand(index.shape[0], -1, -1))


def balance_loss(
    routing: Routing,
    token_mask: Tensor,
    *,
    scale: str = "mean",
    layers: str = "mean_of_layers",
    group: str = "sample",
    sample_weights: Tensor | None = None,
    global_load: Tensor | None = None,
) -> Tensor:
    """`sum_j f_j P_j` over the tokens of `token_mask` (bool `[B, S]`); a float32 scalar, NOT times `balance_coef`.

    f_j is the share of tokens that chose expert j (a constant), P_j the mean probability of j. Padding is whatever
    `token_mask` leaves out. The minimum is 1 / K with `scale='mean'`.

    Args:
        scale: `mean`: as above. `switch`: times K. `raw`: counts times summed probabilities, Eq. 7-8 to the letter,
            which grows with the square of the number of tokens.
        layers: `mean_of_layers`: one product a layer, averaged. `pooled`: f and P over the tokens of all layers
            together, so that layers may cancel (released code).
        group: which tokens share f and P. `sample`: one loss a sample, averaged with `sample_weights`.
            `micro_batch`: all tokens given. `global_batch`: f from `global_load`; P is the mean over samples.
        sample_weights: `[B]`; None means 1 / B each. A trainer that sums over micro-batches and averages over ranks
            passes weights whose total over the global batch is right, and the result does not depend on how samples
            are split. In `micro_batch` their sum multiplies the loss.
        global_load: for `global_batch`, tokens per layer and expert `[L, K]`; zeros stand for a uniform load.

    A sample or batch without tokens contributes 0.
    """
    if not routing.logits:
        return torch.zeros((), device=token_mask.device)
    logits = torch.stack(routing.logits)
    mask = token_mask.to(logits.dtype)
    counts_LBK = choice_counts(routing, token_mask).to(logits.dtype) / routing.index[0].shape[-1]
    probs_LBK = torch.einsum("lbsk,bs->lbk", logits.softmax(dim=-1), mask)
    tokens_B = mask.sum(dim=1)
    weights_B = _sample_weights(sample_weights, tokens_B)
    num_layers, _, num_experts = counts_LBK.shape
    if group == "global_batch":
        if global_load is None:
            raise ConfigError("balance_group 'global_batch' needs global_load")
        return _global_balance(probs_LBK, tokens_B, weights_B, global_load, scale, layers)
    if group == "micro_batch":
        counts_LBK, probs_LBK = counts_LBK.sum(1, keepdim=True), probs_LBK.sum(1, keepdim=True)
        tokens_B, weights_B = tokens_B.sum(0, keepdim=True), weights_B.sum(0, keepdim=True)
    if layers == "pooled":
        counts_LBK, probs_LBK = counts_LBK.sum(0, keepdim=True), probs_LBK.sum(0, keepdim=True)
        tokens_B = tokens_B * num_layers
    if scale != "raw":
        tokens_B1 = tokens_B.clamp(min=1).unsqueeze(-1)
        counts_LBK, probs_LBK = counts_LBK / tokens_B1, probs_LBK / tokens_B1
    value_B = (counts_LBK * probs_LBK).sum(dim=-1).mean(dim=0)
    return (value_B * weights_B).sum() * (num_experts if scale == "switch" else 1)


def _sample_weights(sample_weights: Tensor | None, tokens_B: Tensor) -> Tensor:
    if sample_weights is None:
        return torch.full_like(tokens_B, 1 / max(1, tokens_B.shape[0]))
    return sample_weights.to(tokens_B)


def _global_balance(
    probs_LBK: Tensor, tokens_B: Tensor, weights_B: Tensor, load_LK: Tensor, scale: str, layers: str
) -> Tensor:
    num_experts = probs_LBK.shape[-1]
    load_LK = load_LK.to(probs_LBK)
    if scale != "raw":
        probs_LBK = probs_LBK / tokens_B.clamp(min=1).view(1, -1, 1)
        total = load_LK.sum(dim=-1, keepdim=True)
        load_LK = torch.where(total > 0, load_LK / total.clamp(min=1), torch.full_like(load_LK, 1 / num_experts))
    probs_LK = (probs_LBK * weights_B.view(1, -1, 1)).sum(dim=1)
    if layers == "pooled":
        load_LK, probs_LK = load_LK.mean(0, keepdim=True), probs_LK.mean(0, keepdim=True)
    return (load_LK * probs_LK).sum(dim=-1).mean() * (num_experts if scale == "switch" else 1)


def z_loss(routing: Routing, token_mask: Tensor, sample_weights: Tensor | None = None) -> Tensor:
    """Mean of `logsumexp(logits)^2` over a sample's tokens and all layers, summed with `sample_weights` (None: 1 / B).

    A float32 scalar, NOT times `z_loss_coef`. `token_mask` is bool `[B, S]`.
    """
    if not routing.logits:
        return torch.zeros((), device=token_mask.device)
    squares_BS = torch.stack(routing.logits).logsumexp(dim=-1).square().mean(dim=0)
    mask = token_mask.to(squares_BS.dtype)
    tokens_B = mask.sum(dim=1)
    value_B = (squares_BS * mask).sum(dim=1) / tokens_B.clamp(min=1)
    return (value_B * _sample_weights(sample_weights, tokens_B)).sum()
