"""The world of the search: frozen models, projected image features of the images of a split, and the facts' tokens.

Only the splits that are asked for are opened. The search asks for train and validation, whose images both come from the
world's train images; `score` alone asks for the test.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llava_mole.common.errors import DataError
from llava_mole.common.files import atomic_path, sha256_of, sha256_of_json
from llava_mole.config import load_config
from llava_mole.data.prepare.sources.tiny.facts import WORDS, split_images
from llava_mole.data.prepare.sources.tiny.samples import DOMAINS
from llava_mole.model.builder import build_image_processor, build_parts, load_projector
from scripts.conflict.stack import FrozenLlama

IMAGES_PER_DOMAIN = {"train": 1024, "validation": 256, "test": 512}
"""Most images of a domain that a split uses."""
END_OF_QUESTION = "?"


@dataclass
class World:
    """What all runs share. `features[split, domain]` is float32 `[N, P, D]`, with P positions for an image."""

    base: FrozenLlama
    features: dict[tuple[str, str], Tensor]
    names: dict[tuple[str, str], list[str]]
    word_ids: dict[str, int]
    end_id: int
    image_positions: int
    digest: str
    """Of all weights and image files' names that determine a run."""
    index: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    stacked: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in {key[0] for key in self.features}:
            found = [self.features[split, domain] for domain in DOMAINS]
            self.stacked[split] = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        self.index = {key: {name: i for i, name in enumerate(names)} for key, names in self.names.items()}

    @property
    def length(self) -> int:
        """Positions of a sample: image, two words, question mark."""
        return self.image_positions + 3

    def embed(self, split: str, domain_of: Tensor, image: Tensor, words: Tensor) -> Tensor:
        """Embeddings `[..., S, D]` of samples, from int64 domain, image `[...]` and words `[..., 2]` (token ids)."""
        table = self.base.embeddings
        pictures = self.stacked[split][domain_of, image]
        end = table[self.end_id].expand(*image.shape, 1, -1)
        return torch.cat([pictures, table[words], end], dim=-2)


def load_world(
    config: Path,
    projector: Path,
    data: Path,
    cache: Path,
    *,
    image_positions: int,
    splits: Sequence[str] = ("train", "validation"),
) -> World:
    """Load models and features; features are computed once for a set of weights and kept in `cache`.

    Args:
        config: A stage-2 configuration, of which the section `model` is used.
        projector: A run of stage 1.
        data: The folder of `llava-mole prepare tiny`.
        cache: A folder for the features.
        image_positions: P, to which the projected features of an image are averaged: 1, 4 or 16.
        splits: Which to open.

    Raises:
        DataError: the data are not there, or the tokenizer cuts a word into pieces.
    """
    model_config = load_config(config).model
    model, tokenizer, fingerprints = build_parts(model_config)
    load_projector(model.projector, projector)
    model.requires_grad_(False).eval().float()
    weights = sha256_of_json(
        [
            fingerprints,
            sorted((name, value.double().sum().item()) for name, value in model.projector.state_dict().items()),
        ]
    )
    names = {(split, domain): _names(data, domain, split) for split in splits for domain in DOMAINS}
    manifest = sha256_of(data / "manifest.json")
    features = {}
    for (split, domain), listed in names.items():
        key = sha256_of_json([weights, manifest, listed])[:16]
        path = cache / f"features-{split}-{domain}-{key}.pt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _encode(model, data, listed, f"{domain} {split}")
            with atomic_path(path) as temporary:
                torch.save(found, temporary)
        full = torch.load(path, weights_only=True).float()
        features[split, domain] = _pool(full, image_positions)
    word_ids = {word: _one_token(tokenizer, f" {word}", word) for word in WORDS}
    base = FrozenLlama(model.causal_lm, image_positions + 3)
    digest = sha256_of_json([weights, manifest, image_positions])[:16]
    end = tokenizer(f"{WORDS[0]}{END_OF_QUESTION}", add_special_tokens=False).input_ids[-1]
    return World(base, features, names, word_ids, end, image_positions, digest)


def _names(data: Path, domain: str, split: str) -> list[str]:
    """Paths of the images of a split, relative to `data`, at most `IMAGES_PER_DOMAIN` of them."""
    file = data / domain / ("test.json" if split == "test" else "train.json")
    if not file.is_file():
        raise DataError(f"{file} does not exist; write the data with `llava-mole prepare tiny --out {data}`")
    listed = sorted({record["image"] for record in json.loads(file.read_text(encoding="utf-8"))})
    if split != "test":
        listed = split_images(listed)[0 if split == "train" else 1]
    limit = IMAGES_PER_DOMAIN[split]
    return listed[:: max(1, len(listed) // limit)][:limit]


@torch.no_grad()
def _encode(model: torch.nn.Module, data: Path, names: Sequence[str], label: str) -> Tensor:
    from PIL import Image

    process, found = build_image_processor(model, "pad"), []  # type: ignore[arg-type]
    for start in tqdm(range(0, len(names), 128), desc=f"features {label}", mininterval=10):
        pictures = []
        for name in names[start : start + 128]:
            with Image.open(data / name) as opened:
                pictures.append(torch.as_tensor(process(opened.convert("RGB"))))
        found.append(model.encode_images(torch.stack(pictures)).float())  # type: ignore[operator]
    return torch.cat(found)


def _pool(features_NPD: Tensor, positions: int) -> Tensor:
    """Average a square grid of features `[N, P, D]` to `positions`, itself a square."""
    side, new = round(features_NPD.shape[1] ** 0.5), round(positions**0.5)
    if side**2 != features_NPD.shape[1] or new**2 != positions or side % new:
        raise DataError(
            f"{positions} image positions: {features_NPD.shape[1]} features cannot be averaged to that number"
        )
    grid = features_NPD.transpose(1, 2).reshape(len(features_NPD), -1, side, side)
    return torch.nn.functional.adaptive_avg_pool2d(grid, new).flatten(2).transpose(1, 2).contiguous()


def _one_token(tokenizer: object, text: str, word: str) -> int:
    ids = tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[operator]
    if len(ids) != 1:
        raise DataError(
            f"the tokenizer cuts the word {word!r} into {len(ids)} pieces; the fast loop needs words of one token"
        )
    return int(ids[0])
