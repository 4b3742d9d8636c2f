"""Which experts the tokens of a prompt and its answer use, layer by layer: image patches, text and answer.

`TokenRouting` is the one form of it: the chat colours an answer by it, `llava-mole routing --image` writes it to files,
and the web page shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llava_mole.common.errors import ConfigError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Turn, render
from llava_mole.data.native import ImageLayout
from llava_mole.inference.batching import batches, encode_prompt, image_layouts, image_tokens, place_images
from llava_mole.inference.inputs import ImagesLike, Prompt, as_images
from llava_mole.inference.predictor import Predictor, encode_continuation
from llava_mole.mole import active_config, collect_routing, set_routing_inputs

Role = Literal["image", "prompt", "answer"]


Part = Literal["whole", "tiles"]


@dataclass(frozen=True)
class View:
    """A picture that patches lie on: an image, or with tiles the whole of it or its enlarged part."""

    image: int
    """Of the prompt, from 0."""
    part: Part
    rows: int
    columns: int
    patches: tuple[int, ...]
    """Its tokens, row by row, as positions in the sequence."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.rows, self.columns


@dataclass(frozen=True)
class TokenRouting:
    """The experts of T tokens in L routers with up to K experts; tensors are on the CPU."""

    layers: tuple[str, ...]
    """The routers, by the names of their modules."""
    pieces: tuple[str, ...]
    """The text of each token. Those of the prompt joined are the rendered prompt, those of the answer the answer. An
    image patch has none, and neither has a token that ends within a character."""
    roles: tuple[Role, ...]
    """What each token is."""
    images: torch.Tensor
    """int64 [T]: which image a patch belongs to, from 0 in the order of the prompt; -1 for text. The vectors that end
    the rows of tiles belong to their image, too."""
    experts: torch.Tensor
    """int64 [L, T]: the expert, or the first of several, with which each token is computed."""
    patch_grid: tuple[int, int]
    """Rows and columns of the tokens of an image."""
    probs: torch.Tensor
    """float32 [L, T, K]: what the router gives each expert; 0 for those that a layer does not have. Rows sum to 1.
    Under `force_expert` they are the router's own still."""
    layouts: tuple[ImageLayout | None, ...] = ()
    """How each image becomes tokens; None for each if all take the same."""

    @property
    def num_experts(self) -> int:
        """K, the largest number of experts of a layer."""
        return self.probs.shape[-1]

    @property
    def num_images(self) -> int:
        """Images of the prompt."""
        return max(self.images.tolist(), default=-1) + 1

    @property
    def gates(self) -> torch.Tensor:
        """float32 [L, T]: what the router gives the expert of each token."""
        return self.probs.gather(-1, self.experts.unsqueeze(-1)).squeeze(-1)

    def of_layer(self, layer: int | None) -> list[int]:
        """The expert of each token in a layer (from 0); None: the one that most layers use, the smaller of equals."""
        if layer is not None:
            return self.experts[layer].tolist()
        return self._votes().argmax(dim=-1).tolist()

    def certainty(self, layer: int | None) -> list[float]:
        """How sure `of_layer` is, from 0 to 1: the gate of each token; with None the share of layers that agree."""
        if layer is not None:
            return self.gates[layer].tolist()
        return (self._votes().max(dim=-1).values / len(self.layers)).tolist()

    def part(self, role: Role) -> "TokenRouting":
        """The tokens of one role alone."""
        return self._at([n for n, own in enumerate(self.roles) if own == role])

    def of_view(self, view: View) -> "TokenRouting":
        """The patches of one view, row by row."""
        return self._at(view.patches)

    def load(self, layer: int | None) -> list[float]:
        """Each expert's share of the tokens in a layer, or over all layers; zeros without a token."""
        chosen = self.experts if layer is None else self.experts[layer]
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts).double()
        return (counts / counts.sum().clamp(min=1)).tolist()

    def views(self) -> list[View]:
        """The pictures that the patches lie on: one of each image; with tiles two, the whole image and its tiles.

        Raises:
            ConfigError: an image without tiles has other tokens beside its patches.
        """
        found = []
        for number in range(self.num_images):
            places = (self.images == number).nonzero().flatten().tolist()
            layout = self.layouts[number] if self.layouts else None
            if layout is None:
                rows, columns = self.patch_grid
                if rows * columns != len(places):
                    raise ConfigError(
                        f"an image has {len(places)} tokens, which are no grid of {rows} x {columns}, so they cannot "
                        "be drawn over it"
                    )
                found.append(View(number, "whole", rows, columns, tuple(places)))
                continue
            views = layout.views()
            tokens: list[list[int]] = [[] for _ in views]
            for token, place in zip(places, layout.places(), strict=True):
                if place is not None:
                    tokens[place[0]].append(token)
            for own, (part, rows, columns) in zip(tokens, views, strict=True):
                found.append(View(number, part, rows, columns, tuple(own)))
        return found

    def _votes(self) -> torch.Tensor:
        """int64 [T, K]: how many layers use each expert."""
        return torch.nn.functional.one_hot(self.experts, self.num_experts).sum(dim=0)

    def _at(self, places: Sequence[int]) -> "TokenRouting":
        index = torch.tensor(places, dtype=torch.int64)
        return replace(
            self,
            pieces=tuple(self.pieces[n] for n in places),
            roles=tuple(self.roles[n] for n in places),
            images=self.images[index],
            experts=self.experts[:, index],
            probs=self.probs[:, index],
        )


def route_answer(predictor: Predictor, images: ImagesLike, prompt: Prompt, answer: str) -> TokenRouting:
    """Compute a prompt with its answer in one pass and read the routing of all their tokens.

    The answer's tokens are those of its text. A model may write a text in other tokens than the tokenizer would; what
    is shown is then the routing of the tokenizer's.
    Under `force_expert` all tokens use that expert.

    Raises:
        ConfigError: the model has no experts.
        PromptError: as for `Predictor.generate`, or the answer is empty.
    """
    loaded = predictor.loaded
    model = loaded.model.language_model
    config = active_config(model)
    if config is None:
        raise ConfigError(f"{loaded.path} has no experts (its adapter is {loaded.adapter}), so there is no routing")
    turns = place_images(prompt, len(as_images(images)), 0)
    layouts, shown = image_layouts(loaded, images, 0), image_tokens(loaded, images, 0)
    ids, count = _tokens(predictor, turns, shown, answer)
    (batch,) = batches(loaded, [ids], [images], 1)
    if config.granularity == "sequence":  # decided by the prompt alone, as in decoding
        prompt_mask = torch.arange(len(ids), device=batch.input_ids.device)[None] < len(ids) - count
        set_routing_inputs(model, prompt_mask=prompt_mask)
    try:
        with torch.inference_mode():
            inputs = predictor.embed(batch)
            loaded.model.causal_lm(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
            routing = collect_routing(model)
            experts = torch.stack([index[0, :, 0] for index in routing.index]).cpu()
            probs = routing.stacked_logits()[:, 0].float().softmax(dim=-1).cpu()
    finally:
        if config.granularity == "sequence":
            set_routing_inputs(model)
    is_image = torch.tensor(ids) == IMAGE_TOKEN_INDEX
    first = len(ids) - count
    roles = tuple[Role, ...](
        "image" if image else "prompt" if n < first else "answer" for n, image in enumerate(is_image.tolist())
    )
    return TokenRouting(
        layers=routing.names,
        pieces=(*_prompt_pieces(predictor, turns, shown), *_pieces(predictor, ids[first:])),
        roles=roles,
        patch_grid=loaded.model.image_grid,
        images=torch.full((len(ids),), -1).masked_scatter(
            is_image, torch.arange(len(shown)).repeat_interleave(torch.tensor(shown, dtype=torch.int64))
        ),
        experts=experts.clone(),  # usable outside inference mode
        probs=probs.clone(),
        layouts=tuple(layouts),
    )


def _prompt_pieces(predictor: Predictor, turns: list[Turn], tokens: Sequence[int]) -> list[str]:
    """The text of every token of `encode_prompt`; joined they are the rendered prompt without its `<image>`."""
    tokenizer = predictor.loaded.tokenizer
    pieces = [] if tokenizer.bos_token_id is None else [""]
    text = render(predictor.template, turns, add_generation_prompt=True).text
    for n, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        pieces += [""] * (tokens[n - 1] if n else 0)
        shown = 0
        for _, end in tokenizer.encode_with_offsets(chunk)[1] if chunk else ():
            pieces.append(chunk[shown:end])
            shown = max(shown, end)
    return pieces


def _tokens(predictor: Predictor, turns: list[Turn], shown: Sequence[int], answer: str) -> tuple[list[int], int]:
    """Ids of a prompt with its answer, and how many are the answer's. Those of the prompt are what decoding sees.

    Some tokenizers merge the end of a prompt with the beginning of the answer; the answer is then tokenized alone.
    """
    loaded, template = predictor.loaded, predictor.template
    prompt = encode_prompt(loaded, template, turns, shown, 0)
    ids, count = encode_continuation(loaded, template, turns, answer, shown, 0, with_end=False)
    if ids[: len(prompt)] == prompt:
        return ids, count
    alone, _ = loaded.tokenizer.encode_with_offsets(answer)
    return [*prompt, *alone], len(alone)


def _pieces(predictor: Predictor, ids: list[int]) -> tuple[str, ...]:
    shown, found = "", []
    for n in range(len(ids)):
        text = predictor.loaded.tokenizer.decode(ids[: n + 1])
        whole = text if n + 1 == len(ids) else text.rstrip("\ufffd")
        found.append(whole[len(shown) :] if whole.startswith(shown) else "")
        shown = whole if whole.startswith(shown) else shown
    return tuple(found)
