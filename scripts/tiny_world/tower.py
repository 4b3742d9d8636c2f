"""The small vision tower: an open_clip ViT, trained contrastively on the tiny world's train images and true sentences.

Each image is matched with the short sentences (`Sample.facts`) that are true of it, against all sentences that are
not, and each sentence with its images (InfoNCE with several positives, in both directions). The truth is known exactly,
so that no true pair is used as a negative. Only the visual half is kept.
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

from llava_mole.constants import CLIP_MEAN, CLIP_STD
from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE, Sample
from llava_mole.data.prepare.sources.tiny.world import progress

OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 5, "width": 160, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 14, "vocab_size": 1024, "width": 96, "heads": 3, "layers": 2},
}
"""quick_gelu as in OpenAI's towers. 64 / 16 gives 4 x 4 patch tokens. The text half is used in training only."""


@dataclass(frozen=True)
class Recipe:
    """Size of the training run."""

    images_per_domain: int = 9000
    steps: int = 1000
    batch_size: int = 192
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50


QUICK = Recipe(images_per_domain=60, steps=4, batch_size=24, warmup_steps=2)


def training_samples(count: int, seed: int) -> list[Sample]:
    """Return `count` images of each domain for training the tower; none of them is a test image.

    The general domain has 4,000 training images; the rest are variations of them.
    """
    from llava_mole.data.prepare.sources.tiny.world import MOST_TEST_IMAGES

    taken: set[bytes] = set()
    document.generate(MOST_TEST_IMAGES, Random(f"{seed}-document-test"), taken)
    rng = Random(f"{seed}-tower")
    shapes = general.load("train", count)[0]
    return [
        *shapes,
        *(general.vary(rng.choice(shapes), rng) for _ in range(count - len(shapes))),
        *document.generate(count, rng, taken),
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
    encode: Callable[[str], list[int]], recipe: Recipe, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train the tower.

    Args:
        encode: Text -> token ids below the config's `vocab_size` - 1 (the last id marks the end of a text).
        recipe: Size of the run.
        seed: Determines images, initialisation and order.

    Returns:
        The visual half's float32 state dict with keys `visual.*`, and measurements (loss, retrieval accuracy on train
        images, seconds).
    """
    import open_clip

    started = time.perf_counter()
    samples = training_samples(recipe.images_per_domain, seed)
    pixels = to_pixels(samples)
    sentences, truth = truth_table(samples)
    text = OPEN_CLIP_CONFIG["text_cfg"]
    tokens = torch.zeros(len(sentences), text["context_length"], dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids = [*encode(sentence)[: text["context_length"] - 1], text["vocab_size"] - 1]
        tokens[row, : len(ids)] = torch.tensor(ids)
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**OPEN_CLIP_CONFIG)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(seed)
    # Shapes are the hardest to recognise: their images are drawn twice as often.
    weight = torch.tensor([2.0 if "shape" in sample.facts[-1] else 1.0 for sample in samples])
    averages = dict.fromkeys(("loss", "top"), 0.0)
    bar = progress(range(recipe.steps), "tower", "step")
    for step in bar:
        scale = min(1.0, (step + 1) / recipe.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale
        rows = torch.multinomial(weight, recipe.batch_size, replacement=True, generator=generator)
        image_features = clip.encode_image(normalise(pixels[rows]), normalize=True)
        text_features = clip.encode_text(tokens, normalize=True)
        logits = clip.logit_scale.exp().clamp(max=60) * image_features @ text_features.T
        loss = contrastive_loss(logits, truth[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            # Share of an image's true sentences that rank above all false ones.
            best_false = logits.masked_fill(truth[rows], -torch.inf).amax(1, keepdim=True)
            top = (logits > best_false)[truth[rows]].float().mean().item()
        keep = min(0.98, step / (step + 1))
        for key, value in (("loss", loss.item()), ("top", top)):
            averages[key] = keep * averages[key] + (1 - keep) * value
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {averages['loss']:.3f} top {averages['top']:.3f}", refresh=False)
    measured = {"loss": averages["loss"], "true_above_false": averages["top"]}
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
