"""Conflict between tokens inside an expert.

A token with input x uses an expert with the pair A `[r, I]`, B `[r, O]`, scaling s and expert weight w. The output of
the projection is `y = W x + s w (x A^T) B`. With dy the gradient of the loss with respect to y, the token's gradient of
B is the outer product of `s w x A^T` and dy, `[r, O]`. It is never built: its inner product with a matrix M is
`s w (x A^T) M dy`, and its norm is `s w |x A^T| |dy|`. The sum over the tokens is the gradient of B.

Hooks on the base linears note x A^T and dy, so one backward pass gives all tokens of all experts.

Shape legend: T tokens, S sources, K experts, R rank, O output size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llava_mole.analysis.conflict.gradients import Reduction, layer_of, row_losses
from llava_mole.analysis.conflict.statistics import half_width, mean_of
from llava_mole.analysis.probe import Advance, Row, no_progress
from llava_mole.model.adapters import parameter_part
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole.access import all_weights, overridden
from llava_mole.mole.layer import ExpertLayer
from llava_mole.mole.router import Route
from llava_mole.mole.routing import in_backward


@dataclass
class Site:
    """One projection of a decoder layer's FFN with its experts; plain LoRA is one expert."""

    name: str
    layer: int | None
    linear: nn.Module
    """The base linear, whose input and output gradient are those of the experts."""
    pair: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """A `[K, R, I]` and B `[K, R, O]`."""
    scaling: float
    router: str | None
    """Name of the layer whose decision chooses the experts; None for one expert."""
    hidden: list[torch.Tensor] = field(default_factory=list)
    """`x A^T` `[T, K, R]` of the forward passes so far."""
    weights: list[torch.Tensor] = field(default_factory=list)
    """Expert weights `[T, K]`, likewise."""
    dy: list[torch.Tensor] = field(default_factory=list)
    """`[T, O]`, likewise."""


def find_sites(model: LlavaMole) -> list[Site]:
    """The sites of the active adapter. Those of experts computed FFN by FFN (`mix` `ffn_output`) are left out."""
    from peft.tuners.lora.layer import LoraLayer

    sites: list[Site] = []
    owner: str | None = None
    for name, module in model.named_modules():
        layer = layer_of(name)
        if isinstance(module, ExpertLayer):
            adapter = module.current_adapter()
            if adapter is None or module.configs[adapter].mix == "ffn_output":
                continue
            config = module.configs[adapter]
            owner = name if adapter in module.mole_router or owner is None else owner
            chooses = owner if config.router_scope == "model" else name
            for projection in module.projections:

                def pair(module: Any = module, adapter: str = adapter, key: str = projection) -> tuple[Any, Any]:
                    a_KRI, b_KRO = module.experts(adapter).pair(key)
                    return a_KRI.expand(len(b_KRO), -1, -1), b_KRO

                sites.append(
                    Site(
                        f"{name}.{projection}",
                        layer,
                        module.linear(projection),
                        pair,
                        module.scaling[adapter],
                        chooses if config.num_experts > 1 else None,
                    )
                )
        elif isinstance(module, LoraLayer) and parameter_part(f"{name}.lora_A.") == "FFN LoRA":
            (adapter,) = module.active_adapters

            def lora(module: Any = module, adapter: str = adapter) -> tuple[Any, Any]:
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                return a.unsqueeze(0), b.T.unsqueeze(0)

            sites.append(Site(name, layer, module.base_layer, lora, module.scaling[adapter], None))
    return sites


@contextmanager
def watched(model: LlavaMole, sites: Sequence[Site]) -> Iterator[list[torch.Tensor]]:
    """Let the sites note every pass with gradients inside the block. Yields the passes' input embeddings.

    A backward pass to these embeddings reaches every site, whatever trains. Backends that sort the tokens by expert are
    replaced, so that all layers have them in one order.
    """
    language_model: nn.Module = model.language_model
    embedded: list[torch.Tensor] = []
    prefix = "language_model."
    decided: dict[str, torch.Tensor] = {}
    names = {site.router.removeprefix(prefix) for site in sites if site.router is not None}

    def note(name: str) -> Callable[[Route], Route]:
        def function(route: Route) -> Route:
            if not in_backward():
                decided[name] = all_weights(route).detach()
            return route

        return function

    def hook(site: Site) -> Callable[..., None]:
        def after_forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if in_backward() or not torch.is_grad_enabled():  # a recomputed layer was noted in its first pass
                return
            a_KRI, _ = site.pair()
            x_TI = args[0].detach().flatten(0, -2)
            hidden_TKR = torch.einsum("ti,kri->tkr", x_TI.to(a_KRI.dtype), a_KRI.detach())
            site.hidden.append(hidden_TKR)
            key = None if site.router is None else site.router.removeprefix(prefix)
            site.weights.append(hidden_TKR.new_ones(hidden_TKR.shape[:2]) if key is None else decided[key])
            output.register_hook(lambda dy: site.dy.append(dy.detach().flatten(0, -2)))

        return after_forward

    def with_gradient(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs_BLD = kwargs["inputs_embeds"]
        if torch.is_grad_enabled():
            if not inputs_BLD.requires_grad:
                inputs_BLD.requires_grad_()
            embedded.append(inputs_BLD)

    with ExitStack() as stack:
        stack.enter_context(overridden(language_model, {name: note(name) for name in names}))
        for module in language_model.modules():
            if isinstance(module, ExpertLayer):
                for config in module.configs.values():
                    stack.callback(setattr, config, "backend", config.backend)
                    config.backend = "masked"
        for site in sites:
            stack.callback(site.linear.register_forward_hook(hook(site)).remove)
        decoder = model.causal_lm.get_decoder()
        stack.callback(decoder.register_forward_pre_hook(with_gradient, with_kwargs=True).remove)
        yield embedded


@dataclass(frozen=True)
class TokenConflict:
    """The tokens of one expert of a site on one batch of every source."""

    layer: int | None
    expert: int
    tokens: torch.Tensor
    """float64 `[S]`: tokens with a gradient."""
    against: torch.Tensor
    """float64 `[S, S]`: share of source i's tokens whose gradient has a cosine below 0 with the mean gradient of source
    j's tokens. On the diagonal the token itself is left out of the mean. NaN without tokens."""
    cosine: torch.Tensor
    """float64 `[S, S]`: of the mean gradients of the sources' tokens."""


def token_conflicts(sites: Sequence[Site], tokens: Sequence[Sequence[int]]) -> list[TokenConflict]:
    """Evaluate what the sites have noted.

    Args:
        tokens: For each source the tokens of its forward passes, in the order of the passes.
    """
    results = []
    sizes = [sum(own) for own in tokens]
    for site in sites:
        # Backward passes come one after another, each of a single forward pass, so both lists are in one order.
        hidden, dy, weights = (torch.cat(values) for values in (site.hidden, site.dy, site.weights))
        of_source = [
            tuple(value.split(sizes)[source].double() for value in (hidden, dy, weights))
            for source in range(len(sizes))
        ]
        for expert in range(hidden.shape[1]):
            results.append(_one_expert(site, expert, [(h[:, expert], d, w[:, expert]) for h, d, w in of_source]))
    return results


def _one_expert(
    site: Site, expert: int, of_source: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> TokenConflict:
    factors = []
    for hidden_TR, dy_TO, weight_T in of_source:
        left_TR = hidden_TR * (site.scaling * weight_T).unsqueeze(-1)
        active = (left_TR != 0).any(dim=-1) & (dy_TO != 0).any(dim=-1)
        factors.append((left_TR[active], dy_TO[active]))
    sums = [left_TR.T @ dy_TO for left_TR, dy_TO in factors]
    count = len(factors)
    against = torch.full((count, count), torch.nan, dtype=torch.float64)
    for i, (left_TR, dy_TO) in enumerate(factors):
        own = left_TR.square().sum(dim=-1) * dy_TO.square().sum(dim=-1)
        for j, total_RO in enumerate(sums):
            product = torch.einsum("tr,ro,to->t", left_TR, total_RO, dy_TO)
            product = product - own if i == j else product
            if len(left_TR) > (i == j) and bool(total_RO.any()):
                against[i, j] = (product < 0).double().mean().item()
    flat = torch.stack([total.flatten() for total in sums])
    norms = flat.norm(dim=-1)
    cosine = flat @ flat.T / (norms.unsqueeze(0) * norms.unsqueeze(1))
    tokens = torch.tensor([len(left_TR) for left_TR, _ in factors], dtype=torch.float64)
    return TokenConflict(site.layer, expert, tokens, against, cosine.cpu())


def measure_tokens(
    model: LlavaMole,
    batch: Callable[[int, int], Sequence[Row]],
    sources: Sequence[str],
    batches: int,
    reduction: Reduction,
    advance: Advance = no_progress,
) -> list[list[TokenConflict]]:
    """The token conflicts of N batches, each a list over sites and experts; call it inside `undisturbed`.

    Memory: `T O` numbers for every FFN projection and the tokens T of one batch of all sources.
    """
    results = []
    for number in range(batches):
        sites = find_sites(model)
        if not sites:
            return []
        tokens: list[list[int]] = []
        with watched(model, sites) as embedded:
            for source in range(len(sources)):
                rows = batch(number, source)
                for loss in row_losses(model, rows, reduction):
                    torch.autograd.grad(loss, embedded.pop())
                advance(1)
                tokens.append([row["input_ids"].numel() for row in rows])
        results.append(token_conflicts(sites, tokens))
    return results


def describe_tokens(found: Sequence[Sequence[TokenConflict]]) -> dict[str, Any]:
    """Shares as plain values: over all experts, by layer, and by layer and expert, with 95% intervals over batches.

    An expert counts by its tokens. The projections of an FFN are taken together.
    """
    if not found:
        return {}
    layers = sorted({each.layer for each in found[0] if each.layer is not None})
    pairs = sorted({(each.layer, each.expert) for each in found[0] if each.layer is not None})
    return {
        "all": _over(found, lambda each: True),
        "layers": {str(layer): _over(found, lambda each, n=layer: each.layer == n) for layer in layers},  # type: ignore[misc]
        "experts": [
            {
                "layer": layer,
                "expert": expert,
                **_over(found, lambda each, n=layer, k=expert: (each.layer, each.expert) == (n, k)),  # type: ignore[misc]
            }
            for layer, expert in pairs
        ],
    }


def _over(found: Sequence[Sequence[TokenConflict]], chosen: Callable[[TokenConflict], bool]) -> dict[str, Any]:
    shares, tokens = [], []
    for batch in found:
        own = [each for each in batch if chosen(each)]
        weight = torch.stack([each.tokens for each in own]).unsqueeze(-1)
        share = torch.stack([each.against for each in own])
        weight = torch.where(share.isfinite(), weight, 0)
        shares.append(torch.where(share.isfinite(), share * weight, 0).sum(dim=0) / weight.sum(dim=0))
        tokens.append(torch.stack([each.tokens for each in own]).sum(dim=0))
    values = torch.stack(shares)
    return {
        "against": mean_of(values).tolist(),
        "interval": half_width(values).tolist(),
        "tokens": torch.stack(tokens).sum(dim=0).tolist(),
    }
