"""The files of a `llava-hf` checkpoint beside its weights: configuration, tokenizer, processor, chat template."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from llava_mole.common.errors import ConfigError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import TOKENIZER_TEMPLATE, Template
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.tokenization import HFTextTokenizer, end_ids, load_tokenizer
from llava_mole.interop.causal_lm import base_end_ids
from llava_mole.interop.own import OwnCheckpoint
from llava_mole.interop.towers import image_processor
from llava_mole.model.builder import TOKENIZER_DIR
from llava_mole.model.multimodal_projector import NEWLINE

SELECT_STRATEGY: dict[str, Literal["default", "full"]] = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Kind of tower -> transformers' name for "all patches": `default` drops the first token, CLIP's class token."""
JINJA = """
{%- for message in messages -%}
  {%- set parts = namespace(image='', text='') -%}
  {%- if message['content'] is string -%}
    {%- set parts.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%} {%- set parts.image = t.image -%}
      {%- else -%} {%- set parts.text = parts.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if t.strip -%} {%- set parts.text = parts.text | trim -%} {%- endif -%}
  {{- t.system if loop.first -}}
  {%- if message['role'] == 'user' -%}
    {{- t.between_rounds if not loop.first -}}
    {{- t.user_start + (t.first_text_prefix if loop.first else '') + parts.image + parts.text + t.user_end -}}
  {%- else -%}
    {{- t.answer_marker + t.answer_start + parts.text + t.answer_end -}}
  {%- endif -%}
{%- endfor -%}
{{- t.answer_marker if add_generation_prompt -}}
"""
"""Renders a conversation; `t` holds the texts of a `Template`."""


def tokenizer_with_image(own: OwnCheckpoint) -> tuple[Any, int]:
    """The checkpoint's tokenizer with `<image>` as a special token, and the id of that token."""
    from transformers import AddedToken

    tokenizer = load_tokenizer(str(own.path / TOKENIZER_DIR))
    tokenizer.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # as batched generation needs it; `load_tokenizer` has it saved
    return tokenizer, int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))


def embeddings_to_grow(own: OwnCheckpoint, tokenizer: Any, image_id: int) -> dict[str, tuple[int, int]]:
    """Matrices with too few rows for the image token: name -> (rows needed, row to copy).

    The copied row is the unknown token's. The two tokens have equal logits, so the image token never wins, and all
    other logits stay as they are.
    """
    copied = next(t for t in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None)
    model = own.skeleton.model
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [f"{name}.weight" for name, module in model.named_modules() if module in modules]
    too_small = [name for name in weights if name in own.weights and own.skeleton.shapes[name][0] <= image_id]
    return dict.fromkeys(too_small, (image_id + 1, copied))


def llava_config(own: OwnCheckpoint, image_id: int) -> Any:
    """`LlavaConfig` of a checkpoint, with the image token; with tiles `LlavaNextConfig`.

    Raises ConfigError for other projectors than mlp2x_gelu and other towers than CLIP's and SigLIP's.
    """
    from transformers import LlavaConfig, LlavaNextConfig

    model, grid = own.config.model, own.grid
    if model.projector.removesuffix(NEWLINE) != "mlp2x_gelu":
        raise ConfigError(f"model.projector is {model.projector!r}; the layout of llava-hf has 'mlp2x_gelu' only")
    if own.tower.kind not in SELECT_STRATEGY:
        raise ConfigError(
            f"the vision tower of {own.path} is {own.tower.kind!r}; the layout of llava-hf has "
            f"{' and '.join(SELECT_STRATEGY)} only"
        )
    vision = own.tower.transformers_config(own.path)
    text = own.skeleton.config.to_dict()
    text["vocab_size"] = max(own.skeleton.config.get_text_config().vocab_size, image_id + 1)
    kind: Any = LlavaConfig if grid is None else LlavaNextConfig
    tiles = {} if grid is None else {"image_grid_pinpoints": [list(pair) for pair in grid.pinpoints]}
    return kind(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=model.vision_tower.select_layer,
        vision_feature_select_strategy=SELECT_STRATEGY[own.tower.kind],
        projector_hidden_act="gelu",
        architectures=[f"{kind.__name__.removesuffix('Config')}ForConditionalGeneration"],
        **tiles,
    )


def write_processor(own: OwnCheckpoint, tokenizer: Any, directory: Path) -> list[str]:
    """Write the tokenizer, the image processor, the chat template, and the generation and processor configurations.

    Returns what a caller of `generate` has to know.
    """
    from transformers import GenerationConfig, LlavaNextProcessor, LlavaProcessor

    kind: Any = LlavaProcessor if own.grid is None else LlavaNextProcessor
    name, text_tokenizer = own.manifest["template"], HFTextTokenizer(tokenizer)
    template = resolve_template(name, text_tokenizer)
    by_tokenizer = name == TOKENIZER_TEMPLATE
    processor = kind(
        image_processor=image_processor(own.tower, own.aspect_ratio, own.grid),
        tokenizer=tokenizer,
        patch_size=own.tower.transformers_config(own.path)["patch_size"],
        vision_feature_select_strategy=SELECT_STRATEGY[own.tower.kind],
        num_additional_image_tokens=int(SELECT_STRATEGY[own.tower.kind] == "default"),
        chat_template=tokenizer.chat_template if by_tokenizer else chat_template(template, after_image(tokenizer)),
    )
    processor.save_pretrained(str(directory))
    ends = list(end_ids(text_tokenizer, base_end_ids(own.language_model, own.skeleton.config), template.stop))
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(str(directory))
    if len(text_tokenizer.encode_with_offsets(template.stop)[0]) == 1:
        return []
    return [
        f"answers end with {template.stop!r}, which is not one token: call generate with "
        f"stop_strings=[{template.stop!r}] and tokenizer=processor.tokenizer"
    ]


def after_image(tokenizer: Any) -> str:
    """The separator between `<image>` and the text with which transformers gives our token ids.

    It is a line break; some tokenizers need a blank before it. LLaVA tokenizes the text after an image as the start of
    a text, to which Llama's tokenizers add a blank piece. transformers tokenizes it as a continuation, to which some
    add none.
    """
    probe = "\nIs it"
    ours = tokenizer(probe, add_special_tokens=False).input_ids
    for separator in ("\n", " \n"):
        text = DEFAULT_IMAGE_TOKEN + separator + probe.removeprefix("\n")
        if tokenizer(text, add_special_tokens=False).input_ids[1:] == ours:
            return separator
    return "\n"


def chat_template(template: Template, separator: str = "\n") -> str | None:
    """A conversation template in Jinja; None for caption templates, which hold no conversation.

    A message's content is a text or a list of text and image parts; `separator` stands between its image and its text.
    """
    if template.caption:
        return None
    fields = {**asdict(template), "image": DEFAULT_IMAGE_TOKEN + separator}
    used = {name: value for name, value in fields.items() if f"t.{name}" in JINJA}
    return "{%- set t = " + json.dumps(used) + " -%}" + JINJA
