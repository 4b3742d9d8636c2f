"""Which experts the tokens of an answer use, layer by layer."""

from dataclasses import dataclass

import torch

from llava_mole.common.errors import ConfigError
from llava_mole.conversation import Turn
from llava_mole.inference.batching import batches, encode_prompt, place_images
from llava_mole.inference.inputs import ImagesLike, Prompt, as_images
from llava_mole.inference.predictor import Predictor, encode_continuation
from llava_mole.mole import active_config, collect_routing, set_routing_inputs


@dataclass(frozen=True)
class TokenRouting:
    """The experts of an answer's n tokens in L routers."""

    pieces: tuple[str, ...]
    """The text of each token; joined they are the answer. A token that ends within a character has none."""
    experts: torch.Tensor
    """int64 [L, n], on the CPU: the expert, or the first of several, with which each token is computed."""
    num_experts: int
    """The largest number of experts of a layer."""

    def of_layer(self, layer: int | None) -> list[int]:
        """The expert of each token in a layer (from 0); None: the one that most layers use, the smaller of equals."""
        if layer is not None:
            return self.experts[layer].tolist()
        counts = torch.nn.functional.one_hot(self.experts, self.num_experts).sum(dim=0)
        return counts.argmax(dim=-1).tolist()


def route_answer(predictor: Predictor, images: ImagesLike, prompt: Prompt, answer: str) -> TokenRouting:
    """Compute a prompt with its answer in one pass and read the routing of the answer's tokens.

    The tokens are those of the answer's text. A model may write a text in other tokens than the tokenizer would; what
    is shown is then the routing of the tokenizer's.
    Under `force_expert` all of them use that expert.

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
    ids, count = _tokens(predictor, turns, len(as_images(images)), answer)
    (batch,) = batches(loaded, [ids], [images], 1)
    if config.granularity == "sequence":  # decided by the prompt alone, as in decoding
        prompt_mask = torch.arange(len(ids), device=batch.input_ids.device)[None] < len(ids) - count
        set_routing_inputs(model, prompt_mask=prompt_mask)
    try:
        with torch.inference_mode():
            inputs = predictor.embed(batch)
            loaded.model.causal_lm(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
            routing = collect_routing(model)
    finally:
        if config.granularity == "sequence":
            set_routing_inputs(model)
    experts = torch.stack([index[0, -count:, 0] for index in routing.index]).cpu()
    return TokenRouting(_pieces(predictor, ids[-count:]), experts, routing.num_experts)


def _tokens(predictor: Predictor, turns: list[Turn], images: int, answer: str) -> tuple[list[int], int]:
    """Ids of a prompt with its answer, and how many are the answer's. Those of the prompt are what decoding sees.

    Some tokenizers merge the end of a prompt with the beginning of the answer; the answer is then tokenized alone.
    """
    loaded, template = predictor.loaded, predictor.template
    prompt = encode_prompt(loaded, template, turns, images, 0)
    ids, count = encode_continuation(loaded, template, turns, answer, 0, with_end=False)
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
