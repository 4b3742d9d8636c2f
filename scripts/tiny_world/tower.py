"""The small vision tower: an open_clip ViT, trained contrastively on the tiny world's train images and true sentences.

Each image is matched with the short sentences (`Sample.facts`) that are true of it, against all sentences that are
not, and each sentence with its images (InfoNCE with several positives, in both directions). The truth is known exactly,
so that no true pair is used as a negative. A second head does the same with the patch tokens that LLaVA reads. Only the
visual half is kept.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llava_mole.common.log import get_logger
from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE, Sample
from llava_mole.data.prepare.sources.tiny.world import progress
from scripts.tiny_world.checkpoint import Checkpoint
from scripts.tiny_world.probes import probe

LOG = get_logger("llava_mole.tiny_world")
OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 5, "width": 160, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 14, "vocab_size": 1024, "width": 64, "heads": 2, "layers": 2},
}
"""quick_gelu as in OpenAI's towers. 64 / 16 gives 4 x 4 patch tokens. The text half is used in training only."""


SELECTED_BLOCK = -2
"""LLaVA reads the patch tokens that leave the last block but one."""


@dataclass(frozen=True)
class Recipe:
    """Size of the training run."""

    images_per_domain: int = 12000
    steps: int = 2400
    batch_size: int = 128
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    probe_every: int = 400


QUICK = Recipe(images_per_domain=60, steps=4, batch_size=24, warmup_steps=2, probe_every=2)


class TokenHead(torch.nn.Module):
    """Pool the selected block's patch tokens by learned queries; used in training only.

    CLIP's own loss reaches these tokens only through the class token. This head compares them with the sentences
    directly, so that what the sentences say stands in the tokens that LLaVA reads.
    """

    def __init__(self, width: int, embed_dim: int, queries: int = 4) -> None:
        """Create `queries` queries over tokens of `width`."""
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = torch.nn.LayerNorm(width)
        self.project = torch.nn.Linear(queries * width, embed_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map patch tokens `[N, P, width]` to unit vectors `[N, embed_dim]`."""
        tokens = self.norm(tokens)
        pooled, _ = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return F.normalize(self.project(pooled.flatten(1)), dim=-1)


def encode_images(clip: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CLIP's image features `[N, embed_dim]` and the selected block's patch tokens `[N, 16, width]`."""
    kept: list[torch.Tensor] = []
    hook = clip.visual.transformer.resblocks[SELECTED_BLOCK].register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    try:
        features = clip.encode_image(normalise(pixels), normalize=True)
    finally:
        hook.remove()
    return features, kept[0][:, 1:]


def training_samples(count: int, seed: int) -> list[Sample]:
    """Return `count` images of each domain for training the tower; none of them is a validation or test image.

    The general domain has 3,500 training images; the rest are drawn like them.
    """
    from llava_mole.data.prepare.sources.tiny.world import held_out_documents

    rng = Random(f"{seed}-tower")
    shapes = general.load("train", count)[0]
    return [
        *shapes,
        *(general.draw(rng) for _ in range(count - len(shapes))),
        *document.generate(count, rng, held_out_documents(("test", "val"), seed)),
        *biomedicine.generate(count, "train", rng),
    ]


def to_pixels(samples: Sequence[Sample]) -> torch.Tensor:
    """Return the images as uint8 `[N, 3, 64, 64]`."""
    return torch.from_numpy(np.stack([np.asarray(sample.image) for sample in samples])).permute(0, 3, 1, 2)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 `[N, 3, H, W]` to float32, normalised with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


def truth_table(samples: Sequence[Sample]) -> tuple[list[str], torch.Tensor]:
    """Return the F sentences, sorted, and bool `[N, F]`: whether each is true of each sample."""
    sentences = sorted({fact for sample in samples for fact in sample.facts})
    index = {fact: number for number, fact in enumerate(sentences)}
    truth = torch.zeros(len(samples), len(sentences), dtype=torch.bool)
    for row, sample in enumerate(samples):
        truth[row, [index[fact] for fact in sample.facts]] = True
    return sentences, truth


def contrastive_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Compute InfoNCE with several positives from logits, float `[N, F]`, and truth, bool `[N, F]`. Returns a scalar.

    Every true pair competes with the false pairs of its row and with those of its column. All rows have equal weight.
    """
    share = truth / truth.sum(1, keepdim=True)  # [N, F], rows sum to 1
    total = logits.new_zeros(())
    for dim in (1, 0):
        false_sum = logits.masked_fill(truth, -torch.inf).logsumexp(dim, keepdim=True)
        # -log(exp(s) / (exp(s) + false_sum)) = softplus(log false_sum - s)
        total = total + (F.softplus(false_sum - logits) * share).sum() / len(truth)
    return total / 2


def train(
    encode: Callable[[str], list[int]], recipe: Recipe, seed: int, checkpoint: Path | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train the tower.

    Args:
        encode: Text -> token ids below the config's `vocab_size` - 1 (the last id marks the end of a text).
        recipe: Size of the run.
        seed: Determines images, initialisation and order.
        checkpoint: File of the checkpoint to go on from and to write, if any.

    Returns:
        The visual half's float32 state dict with keys `visual.*`, and measurements (loss, probes on test images,
        seconds).
    """
    import open_clip

    started = time.perf_counter()
    samples = training_samples(recipe.images_per_domain, seed)
    taken = {sample.image.tobytes() for sample in samples}
    pixels = to_pixels(samples)
    sentences, truth = truth_table(samples)
    # Shapes are the hardest to recognise: their images are drawn twice as often.
    weight = torch.tensor([2.0 if "shape" in sample.facts[-1] else 1.0 for sample in samples])
    text = OPEN_CLIP_CONFIG["text_cfg"]
    tokens = torch.zeros(len(sentences), text["context_length"], dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids = [*encode(sentence)[: text["context_length"] - 1], text["vocab_size"] - 1]
        tokens[row, : len(ids)] = torch.tensor(ids)
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**OPEN_CLIP_CONFIG)
    head = TokenHead(OPEN_CLIP_CONFIG["vision_cfg"]["width"], OPEN_CLIP_CONFIG["embed_dim"])
    parameters = [*clip.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    kept = Checkpoint(checkpoint, [clip, head], [optimizer])
    first = kept.load(f"{recipe} seed {seed}")
    average = 0.0
    bar = progress(range(first, recipe.steps), "tower", "step")
    for step in bar:
        scale = min(1.0, (step + 1) / recipe.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # so that a resumed run draws the same
        rows = torch.multinomial(weight, recipe.batch_size, replacement=True, generator=generator)
        image_features, patches = encode_images(clip, pixels[rows])
        text_features = clip.encode_text(tokens, normalize=True).T
        temperature = clip.logit_scale.exp().clamp(max=60)
        loss = contrastive_loss(temperature * image_features @ text_features, truth[rows])
        loss = (loss + contrastive_loss(temperature * head(patches) @ text_features, truth[rows])) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
        if (step + 1) % recipe.probe_every == 0 and step + 1 < recipe.steps:
            kept.save(f"{recipe} seed {seed}", step + 1)
            shown = probe(lambda batch: encode_images(clip, batch)[1], "val", min(len(samples) // 3, 1000), set(taken))
            LOG.info("step %d, loss %.3f, %s", step + 1, average, {key: round(value, 3) for key, value in shown.items()})
    measured = {"loss": average}
    clip.eval()
    found = probe(lambda batch: encode_images(clip, batch)[1], "test", min(len(samples) // 3, 3000), set(taken))
    measured |= {f"probe/{key}": value for key, value in found.items()}
    measured["seconds"] = time.perf_counter() - started
    state = {key: value.detach() for key, value in clip.state_dict().items() if key.startswith("visual.")}
    return state, measured


def save(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `config.json` (open_clip's) and the visual half in float16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=1) + "\n", encoding="utf-8")
    half = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
