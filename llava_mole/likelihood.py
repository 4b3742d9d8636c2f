"""How likely a model finds given answers: what multiple choice and perplexity need instead of generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_mole.common.errors import PromptError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import Rendered, Template, Turn, render
from llava_mole.data.tokenization import encode
from llava_mole.model.builder import LoadedModel
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.prompts import Batch, check_room, check_shown, check_text


@dataclass(frozen=True)
class Likelihood:
    """What the model thinks of one continuation."""

    logprob: float
    """Sum of the log probabilities (natural logarithm) of its tokens, given the prompt and each other."""
    is_greedy: bool
    """Whether greedy decoding would write exactly these tokens."""
    tokens: int


def encode_continuation(
    loaded: LoadedModel, template: Template, turns: Sequence[Turn], continuation: str, position: int, with_end: bool
) -> tuple[list[int], int]:
    """Ids of the conversation with `continuation` as its last answer, and how many of them, at the end, are scored.

    The answer is rendered and tokenized as in training, so its first token holds the space that the template puts in
    front of it. Without `with_end` the ids end where the answer's text does.

    Raises:
        PromptError: the continuation is empty, or fills the context; a template that does not show all images.
    """
    if not continuation.strip():
        raise PromptError(position, "its continuation is empty; give the text whose probability is asked for")
    rendered = render(template, [*turns, Turn("assistant", continuation)])
    check_text(rendered.text, position)
    start, end = rendered.answer_spans[-1]
    if not with_end:
        end -= len(template.answer_end)
    only_this = Rendered(rendered.text[:end], ((start, end),))
    encoded = encode(only_this, loaded.tokenizer, num_image_tokens=loaded.model.num_image_tokens, max_length=None)
    given = sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    check_shown(template, encoded.num_images, given, position)
    check_room(loaded, len(encoded.input_ids) - 1, position)
    return encoded.input_ids, encoded.num_supervised


def score_batch(model: LlavaMole, batch: Batch, scored: Sequence[int]) -> list[Likelihood]:
    """Likelihoods of the last `scored[n]` tokens of each row of a left-padded batch."""
    causal_lm: Any = model.causal_lm
    longest = max(scored)
    position_ids = (batch.attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        # Rows end together, so the last positions of all of them hold what is asked for; the head computes no others.
        logits = causal_lm(
            inputs_embeds=model.embed(batch.input_ids, image_index=batch.image_index, features=batch.features),
            attention_mask=batch.attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
        target_BN = batch.input_ids[:, -longest:]
        logprob_BN = logits.float().log_softmax(dim=-1).gather(-1, target_BN.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        greedy_BN = logits.argmax(dim=-1) == target_BN
    return [
        Likelihood(float(logprob_BN[row, -count:].double().sum()), bool(greedy_BN[row, -count:].all()), count)
        for row, count in enumerate(scored)
    ]
