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
from scripts.tiny_world.patches import PatchWords
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
    """Size of the training run: contrastive steps, then steps that refine the tokens."""

    shapes: int = 24000
    """Images of the general domain; most are drawn."""
    others: int = 6000
    """Images of each other domain."""
    steps: int = 1000
    batch_size: int = 192
    shape_weight: float = 2.0
    """How much oftener a shape is drawn than an image of another domain: shapes are the hardest to recognise."""
    learning_rate: float = 1e-3
    refining_steps: int = 900
    refining_batch_size: int = 128
    refining_shape_weight: float = 2.0
    refining_document_weight: float = 2.0
    """How much oftener shapes and documents are drawn than tissue while the tokens are refined."""
    refining_learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup_steps: int = 50
    save_every: int = 100
    probe_images: int = 2000
    """Images to fit a probe on, and at most as many to test it."""


QUICK = Recipe(
    shapes=60,
    others=60,
    steps=3,
    batch_size=24,
    refining_steps=3,
    refining_batch_size=24,
    save_every=2,
    probe_images=60,
)


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


def training_samples(shapes: int, others: int, seed: int) -> list[Sample]:
    """Return images of each domain for training the tower; none of them is a validation or test image.

    The general domain has 3,500 training images; the rest are drawn like them.
    """
    from llava_mole.data.prepare.sources.tiny.world import held_out_documents

    rng = Random(f"{seed}-tower")
    loaded = general.load("train", shapes)[0]
    return [
        *loaded,
        *(general.draw(rng) for _ in range(shapes - len(loaded))),
        *document.generate(others, rng, held_out_documents("train", seed)),
        *biomedicine.generate(others, "train", rng),
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


class Towers(torch.nn.Module):
    """What is trained: CLIP, the head on its tokens, and while the tokens are refined one vector a sentence.

    Refining drops the text half for a table of vectors, which starts as the text half's: that is a third faster.
    """

    def __init__(self, sentences: int, samples: Sequence[Sample]) -> None:
        """Create the modules for this many sentences and these training images."""
        import open_clip

        super().__init__()
        width, embed_dim = OPEN_CLIP_CONFIG["vision_cfg"]["width"], OPEN_CLIP_CONFIG["embed_dim"]
        self.clip = open_clip.CLIP(**OPEN_CLIP_CONFIG)
        self.head = TokenHead(width, embed_dim)
        self.patch_words = PatchWords(samples, width)
        self.table = torch.nn.Parameter(F.normalize(torch.randn(sentences, embed_dim), dim=-1))

    def loss(self, pixels: torch.Tensor, truth: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the mean of CLIP's loss and the head's."""
        features, patches = encode_images(self.clip, pixels)
        sentences = self.clip.encode_text(tokens, normalize=True)
        return (self.compare(features, sentences, truth) + self.compare(self.head(patches), sentences, truth)) / 2

    def refining_loss(
        self, pixels: torch.Tensor, truth: torch.Tensor, rows: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Compute the mean of the head's loss, against the table, and that of the patches' words."""
        _, patches = encode_images(self.clip, pixels)
        sentences = F.normalize(self.table, dim=-1)
        return (self.compare(self.head(patches), sentences, truth) + self.patch_words(patches, rows, generator)) / 2

    def compare(self, images: torch.Tensor, sentences: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Compute InfoNCE between unit vectors of images and of sentences."""
        return contrastive_loss(self.clip.logit_scale.exp().clamp(max=60) * images @ sentences.T, truth)


def train(
    encode: Callable[[str], list[int]],
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    start: Path | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train the tower.

    Args:
        encode: Text -> token ids below the config's `vocab_size` - 1 (the last id marks the end of a text).
        recipe: Size of the run.
        seed: Determines images, initialisation and order.
        checkpoint: File of the checkpoint to go on from and to write, if any.
        start: Weights (`visual.*`) of an earlier tower; they take the place of the contrastive steps.

    Returns:
        The visual half's float32 state dict with keys `visual.*`, and measurements (loss, probes on test images,
        seconds).
    """
    from safetensors.torch import load_file

    started = time.perf_counter()
    samples = training_samples(recipe.shapes, recipe.others, seed)
    taken = {sample.image.tobytes() for sample in samples}
    pixels = to_pixels(samples)
    sentences, truth = truth_table(samples)
    is_shape = torch.tensor(["shape" in sample.facts[-1] for sample in samples])
    text = OPEN_CLIP_CONFIG["text_cfg"]
    tokens = torch.zeros(len(sentences), text["context_length"], dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids = [*encode(sentence)[: text["context_length"] - 1], text["vocab_size"] - 1]
        tokens[row, : len(ids)] = torch.tensor(ids)
    torch.manual_seed(seed)
    towers = Towers(len(sentences), samples)
    is_tissue = ~towers.patch_words.truth.any(-1).any(-1)
    is_document = ~is_shape & ~is_tissue
    steps = recipe.steps
    if start is not None:
        steps = 0
        visual = {key.removeprefix("visual."): value.float() for key, value in load_file(start).items()}
        towers.clip.visual.load_state_dict(visual)
    optimizer = torch.optim.AdamW(
        towers.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    kept = Checkpoint(checkpoint, [towers], [optimizer])
    named = f"{recipe} seed {seed} from {start}"
    first = kept.load(named)
    average = 0.0
    bar = progress(range(first, steps + recipe.refining_steps), "tower", "step")
    for step in bar:
        refining = step >= steps
        if refining:
            done, all_steps, rate = step - steps, recipe.refining_steps, recipe.refining_learning_rate
            size, shape_weight = recipe.refining_batch_size, recipe.refining_shape_weight
            document_weight = recipe.refining_document_weight
        else:
            done, all_steps, rate = step, steps, recipe.learning_rate
            size, shape_weight, document_weight = recipe.batch_size, recipe.shape_weight, 1.0
        if step == steps and start is None:
            with torch.no_grad():
                towers.table.copy_(towers.clip.encode_text(tokens, normalize=True))
        scale = min(1.0, (done + 1) / recipe.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * done / all_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        weight = sum(
            share * which / which.sum()
            for share, which in ((shape_weight, is_shape), (document_weight, is_document), (1.0, is_tissue))
        )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # so that a resumed run draws the same
        rows = torch.multinomial(weight, size, replacement=True, generator=generator)
        if refining:
            loss = towers.refining_loss(pixels[rows], truth[rows], rows, generator)
        else:
            loss = towers.loss(pixels[rows], truth[rows], tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == first else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {average:.3f}", refresh=False)
        if (step + 1) % recipe.save_every == 0:
            kept.save(named, step + 1)
    measured = {"loss": average}
    towers.eval()
    found = probe(lambda batch: encode_images(towers.clip, batch)[1], "test", recipe.probe_images, taken)
    measured |= {f"probe/{key}": value for key, value in found.items()}
    measured["seconds"] = time.perf_counter() - started
    state = {f"visual.{key}": value.detach() for key, value in towers.clip.visual.state_dict().items()}
    return state, measured


def save(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `config.json` (open_clip's) and the visual half in float16."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=1) + "\n", encoding="utf-8")
    half = {key: value.to(torch.float16).contiguous() for key, value in state.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
