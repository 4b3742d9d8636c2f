"""One job of the search: all arms of one cell and seed, trained side by side on the same samples and validated.

A cell is a point of the phase diagram: convention, load, kind of agreed facts, rank. A job is a cell, a seed, some arms
and a recipe; it is reproducible to the digit on one machine with one thread.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_mole.common.errors import ConfigError
from llava_mole.data.prepare.sources.tiny.facts import CATEGORIES, draw, facts
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS
from llava_mole.mole import MoleConfig
from scripts.conflict.stack import Adam, Member, Stack
from scripts.conflict.world import World


@dataclass(frozen=True)
class Cell:
    """A point of the phase diagram."""

    convention: float
    load: int
    rank: int
    agreed: Literal["common", "own"] = "common"


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained. A single domain takes the same steps with a third of the batch, so that each arm sees
    the same samples of a domain, in as many updates."""

    steps: int = 300
    batch: int = 12
    learning_rate: float = 9e-3
    warmup: int = 20
    final_rate: float = 0.05
    validation: int = 256
    """Validation samples of a domain."""


@dataclass(frozen=True)
class Arm:
    """A method: options of `MoleConfig` beside its rank (None: plain LoRA), and what concerns its training only."""

    options: dict[str, Any] | None = None
    preset: str = "paper"
    rank_factor: int = 1
    single: str | None = None
    """The domain it is trained on; None: all of them, mixed equally."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Member` beside the configuration."""

    def member(self, rank: int) -> Member:
        """The arm at a rank."""
        r = rank * self.rank_factor
        if self.options is None:
            return Member(MoleConfig(r=r, num_experts=1, add_balance_loss=False), **self.training)
        options = {"num_experts": len(DOMAINS), **self.options, "add_balance_loss": False}
        return Member(MoleConfig.from_preset(self.preset, r=r, **options), **self.training)


LEAD = {
    "expert_scale": "prob_times_k",
    "balance_scale": "switch",
    "balance_group": "global_batch",
    "balance_coef": 1e-3,
}
"""The best setting of the exploration before this protocol."""
BY_SAMPLE = {**LEAD, "granularity": "sequence"}
"""The same with one decision for a sample."""
ARMS: dict[str, Arm] = {
    "single general": Arm(single="general"),
    "single document": Arm(single="document"),
    "single biomedicine": Arm(single="biomedicine"),
    "mix": Arm(),
    "mix, rank K r": Arm(rank_factor=3),
    "oracle": Arm({"router": "oracle", "balance_coef": 0.0}),
    "random": Arm({"router": "random", "balance_coef": 0.0}),
    "paper": Arm({}),
    "coupled": Arm({}, "coupled"),
    "best": Arm({}, "best"),
    "lead": Arm(LEAD),
    "image": Arm(BY_SAMPLE, training={"image_only": True}),
    "source": Arm(LEAD, training={"source_coef": 0.1}),
}
"""The arms of the phase diagram."""
STRONG = {"balance_coef": 1e-2}
"""Ten times the balance of `lead`."""
ROUTERS: dict[str, Arm] = {
    "lead, balance 0.01": Arm({**LEAD, **STRONG}),
    "lead, router rate x 0.1": Arm(LEAD, training={"router_rate": 0.1}),
    "sequence, one router": Arm({**BY_SAMPLE, "router_scope": "model"}),
    "image, one router": Arm({**BY_SAMPLE, "router_scope": "model"}, training={"image_only": True}),
    "image, one router, balance 0.01": Arm(
        {**BY_SAMPLE, **STRONG, "router_scope": "model"}, training={"image_only": True}
    ),
    "image, balance 0.01": Arm({**BY_SAMPLE, **STRONG}, training={"image_only": True}),
    "source": ARMS["source"],
    "image, source": Arm(BY_SAMPLE, training={"image_only": True, "source_coef": 0.1}),
    "paper, source": Arm({}, training={"source_coef": 0.1}),
}
"""Router variants, which are compared in fewer cells."""
MORE_ROUTERS: dict[str, Arm] = {
    "straight_through, no balance": Arm({"expert_scale": "straight_through", "balance_coef": 0.0}),
    "prob_times_k, no balance": Arm({"expert_scale": "prob_times_k", "balance_coef": 0.0}),
    "lead, balance in the first half": Arm(LEAD, training={"balance_until": 0.5}),
    "lead, temperature from 4 to 1": Arm(LEAD, training={"anneal_from": 4.0}),
    "prob_times_k, load-free bias": Arm(
        {"expert_scale": "prob_times_k", "balance_coef": 0.0, "bias_update_rate": 1e-3}
    ),
    "dense": Arm({"mode": "dense"}),
    "sequence": Arm(BY_SAMPLE),
    "sequence, straight_through": Arm({**BY_SAMPLE, "expert_scale": "straight_through"}),
    "source, experts begin apart": Arm(LEAD, training={"source_coef": 0.1, "separate_until": 0.25}),
}
"""The other candidates, which run when there is time."""


def train(
    world: World, cell: Cell, seed: int, arms: dict[str, Arm], recipe: Recipe
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Train all `arms` of a job and validate them.

    Returns:
        First, by arm: accuracy in % on validation by domain, and by kind of fact; `meters` of routers along training;
        steps, trainable parameters, the last loss; and `seconds`, the time of the whole job. Second, the parameters of
        the two stacks: `single` and `mixed`.
    """
    started, results = time.perf_counter(), {}
    stacks: dict[str, dict[str, Tensor]] = {}
    asked = {d: facts(d, cell.load, cell.convention, seed, cell.agreed) for d in DOMAINS}
    for single in (True, False):
        chosen = arms_of(arms, single)
        if chosen:
            stack, losses, meters = _train_stack(world, cell, seed, chosen, recipe, asked, single)
            accuracy = validate(world, stack, asked, recipe.validation, seed, "validation")
            stacks["single" if single else "mixed"] = stack.state()
            for row, name in enumerate(chosen):
                results[name] = {
                    **accuracy[row],
                    "loss": round(losses[row].item(), 4),
                    "parameters": parameters(stack.members[row], world),
                    "steps": recipe.steps,
                }
                if stack.learned[row]:
                    results[name]["meters"] = [meter[row] for meter in meters]
    return {"arms": results, "seconds": round(time.perf_counter() - started, 1)}, stacks


def arms_of(arms: dict[str, Arm], single: bool) -> dict[str, Arm]:
    """The arms that train on a single domain, or the others; each kind is one stack."""
    return {name: arm for name, arm in arms.items() if (arm.single is not None) == single}


def parameters(member: Member, world: World) -> int:
    """The trainable parameters of an adapter."""
    config, D, inner = member.config, world.base.width, world.base.inner
    slots = config.num_experts * config.r + config.shared_r
    router = (1 if config.router_scope == "model" else len(world.base.layers)) * D * config.num_experts
    attention = (config.attention_r or config.r) * 8 * D
    return len(world.base.layers) * (attention + slots * 3 * (D + inner)) + (router if config.has_router else 0)


def build_stack(world: World, cell: Cell, seed: int, arms: dict[str, Arm]) -> Stack:
    """The untrained stack of some arms of a job."""
    members = [arm.member(cell.rank) for arm in arms.values()]
    return Stack(world.base, members, [seed] * len(members))


@dataclass
class Collated:
    """Samples as tensors: int64 `domain`, `image`, `answer` and `kind` `[N]`, and `words` `[N, 2]`."""

    domain: Tensor
    image: Tensor
    words: Tensor
    answer: Tensor
    kind: Tensor

    def take(self, index: Tensor) -> "Collated":
        """The samples at `index`, of any shape."""
        return Collated(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def collate(world: World, asked: dict[str, list[Any]], count: int, split: Any, seed: int) -> dict[str, Collated]:
    """`count` samples of each domain as tensors."""
    found = {}
    for number, domain in enumerate(DOMAINS):
        drawn = draw(asked[domain], world.names[split, domain], count, split, seed)
        questions = [sample.question for sample in drawn]
        ids = world.word_ids
        found[domain] = Collated(
            torch.full((count,), number),
            torch.tensor([world.index[split, domain][sample.image] for sample in drawn]),
            torch.tensor([[ids[word] for word in q.text.removesuffix("?").split()] for q in questions]),
            torch.tensor([ids[q.answer] for q in questions]),
            torch.tensor([CATEGORIES.index(q.category) for q in questions]),
        )
    return found


def _train_stack(
    world: World, cell: Cell, seed: int, arms: dict[str, Arm], recipe: Recipe, asked: dict[str, list[Any]], single: bool
) -> tuple[Stack, Tensor, list[list[dict[str, Any]]]]:
    stack = build_stack(world, cell, seed, arms)
    optimizer, share = Adam(stack), recipe.batch // len(DOMAINS)
    steps = recipe.steps
    samples = collate(world, asked, recipe.steps * share, "train", seed)
    if single:
        order = [samples[arm.single] for arm in arms.values() if arm.single]
        fields = [torch.stack([getattr(o, f.name) for o in order]) for f in dataclasses.fields(Collated)]
        rows = Collated(*(x.unflatten(1, (steps, share)).transpose(0, 1) for x in fields))
    else:
        fields = [
            torch.cat([getattr(samples[d], f.name).unflatten(0, (steps, share)) for d in DOMAINS], dim=1)
            for f in dataclasses.fields(Collated)
        ]
        rows = Collated(*fields)
    meters, losses = [], torch.zeros(len(arms))
    for step in range(steps):
        batch = rows.take(torch.tensor(step))
        x = world.embed("train", batch.domain, batch.image, batch.words)
        if not single:  # the same samples for all arms
            x = x.expand(len(arms), *x.shape)
            batch = Collated(
                *(
                    getattr(batch, f.name).expand(len(arms), *getattr(batch, f.name).shape)
                    for f in dataclasses.fields(Collated)
                )
            )
        progress = step / steps
        logits, routed = stack.forward(x, batch.domain, world.image_positions, progress)
        losses = (
            F.cross_entropy(logits.flatten(0, 1), batch.answer.flatten(), reduction="none").view(len(arms), -1).mean(1)
        )
        (losses + stack.auxiliary_loss(routed, batch.domain, progress)).sum().backward()
        decay = recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step(recipe.learning_rate * min(1, (step + 1) / recipe.warmup) * decay)
        stack.after_step(routed)
        losses = losses.detach()
        if not losses.isfinite().all():
            raise ConfigError(f"step {step}: the loss is not finite; lower the learning rate {recipe.learning_rate}")
        if bool(stack.learned.any()) and (step + 1) % max(1, steps // 3) == 0:
            meters.append(measure(world, stack, asked, seed, step + 1))
    return stack, losses, meters


@torch.no_grad()
def measure(world: World, stack: Stack, asked: dict[str, list[Any]], seed: int, step: int) -> list[dict[str, Any]]:
    """Router meters of every adapter on 32 validation samples a domain, by layer.

    `information_text` and `information_image`: mutual information of the expert and the sample's source in nats (at
    most ln 3 = 1.099), over the positions of the text and of the image. `last`: the same at the position that answers.
    `load`: share of the busiest expert; `margin`: mean gap between the two largest probabilities.
    """
    data = collate(world, asked, 32, "validation", seed + 1)
    rows = Collated(*(torch.cat([getattr(data[d], f.name) for d in DOMAINS]) for f in dataclasses.fields(Collated)))
    R = len(stack.members)
    x = world.embed("validation", rows.domain, rows.image, rows.words)
    source = rows.domain.expand(R, -1)
    _, routed = stack.forward(x.expand(R, *x.shape), source, world.image_positions)
    own = F.one_hot(source, len(DOMAINS)).float()
    image = slice(0, world.image_positions)
    found: list[dict[str, Any]] = [{"step": step} for _ in range(R)]
    for name, where in (("image", image), ("text", slice(world.image_positions, None)), ("last", slice(-1, None))):
        values = [_information(torch.einsum("rbsk,rbd->rdk", c[:, :, where], own)) for c in routed.chosen]
        for row in range(R):
            found[row][f"information_{name}"] = [round(v[row].item(), 3) for v in values]
    for row in range(R):
        tops = [probs[row].topk(2, dim=-1).values for probs in routed.probs]
        found[row]["load"] = [round(chosen[row].mean(dim=(0, 1)).max().item(), 3) for chosen in routed.chosen]
        found[row]["margin"] = [round((top[..., 0] - top[..., 1]).mean().item(), 3) for top in tops]
    return found


def _information(counts_RDK: Tensor) -> Tensor:
    joint = counts_RDK / counts_RDK.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    product = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    ratio = torch.where(joint > 0, joint / product.clamp(min=1e-30), torch.ones_like(joint))
    return (joint * ratio.log()).sum(dim=(1, 2))


@torch.no_grad()
def validate(
    world: World, stack: Stack, asked: dict[str, list[Any]], count: int, seed: int, split: Literal["validation", "test"]
) -> list[dict[str, Any]]:
    """Accuracy in % of every adapter by domain, and of all domains by kind of fact."""
    data, R = collate(world, asked, count, split, seed), len(stack.members)
    right = {domain: [] for domain in DOMAINS}  # type: dict[str, list[Tensor]]
    for domain, rows in data.items():
        for start in range(0, count, 128):
            part = rows.take(torch.arange(start, min(count, start + 128)))
            x = world.embed(split, part.domain, part.image, part.words)
            logits, _ = stack.forward(x.expand(R, *x.shape), part.domain.expand(R, -1), world.image_positions)
            right[domain].append(logits.argmax(-1) == part.answer)
    by_domain = {domain: torch.cat(found, dim=1).float() for domain, found in right.items()}
    found: list[dict[str, Any]] = []
    for row in range(R):
        entry: dict[str, Any] = {d: round(100 * by_domain[d][row].mean().item(), 2) for d in DOMAINS}
        for number, kind in enumerate(CATEGORIES):
            hits = torch.cat([by_domain[d][row][data[d].kind == number] for d in DOMAINS])
            if len(hits):
                entry[kind] = round(100 * hits.mean().item(), 2)
        found.append(entry)
    return found
