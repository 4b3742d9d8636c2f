"""The files of a `llava-hf` checkpoint beside its weights: configuration, tokenizer, processor, chat template."""

from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError
from llava_mole.constants import DEFAULT_IMAGE_TOKEN
from llava_mole.conversation import TOKENIZER_TEMPLATE, Template, get_template
from llava_mole.data.tokenization import load_tokenizer
from llava_mole.interop.own import OwnCheckpoint
from llava_mole.interop.towers import clip_vision_config, image_processor
from llava_mole.model.builder import TOKENIZER_DIR


def tokenizer_with_image(own: OwnCheckpoint) -> tuple[Any, int]:
    """The checkpoint's tokenizer with `<image>` as a special token, and the id of that token."""
    from transformers import AddedToken

    tokenizer = load_tokenizer(str(own.path / TOKENIZER_DIR))
    token = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # as batched generation needs it
    return tokenizer, int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))


def embeddings_to_grow(own: OwnCheckpoint, tokenizer: Any, image_id: int) -> dict[str, tuple[int, int]]:
    """Matrices with too few rows for the image token: name -> (rows needed, row to copy).

    The new rows copy the unknown token's row. The image token's logit then equals the unknown token's, so it never
    wins, and the logits of all other tokens stay as they are.
    """
    copied = next(t for t in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None)
    model = own.skeleton.model
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [f"{name}.weight" for name, module in model.named_modules() if module in modules]
    too_small = [name for name in weights if name in own.names and own.skeleton.shapes[name][0] <= image_id]
    return dict.fromkeys(too_small, (image_id + 1, copied))


def llava_config(own: OwnCheckpoint, image_id: int) -> Any:
    """The `LlavaConfig` of a checkpoint. Its vocabulary includes the image token.

    Raises:
        ConfigError: the projector is not `mlp2x_gelu`, the only one that transformers supports.
    """
    from transformers import LlavaConfig

    model = own.config.model
    if model.projector != "mlp2x_gelu":
        raise ConfigError(f"model.projector is {model.projector!r}; the layout of llava-hf has 'mlp2x_gelu' only")
    vision = clip_vision_config(own.tower.config, own.path)
    text = own.skeleton.config.to_dict()
    text["vocab_size"] = max(own.skeleton.config.get_text_config().vocab_size, image_id + 1)
    config = LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"},
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=model.vision_tower.select_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def write_processor(own: OwnCheckpoint, tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer, the image processor, the chat template, and the generation and processor configurations."""
    from transformers import GenerationConfig, LlavaProcessor

    name = own.manifest["template"]
    by_tokenizer = name == TOKENIZER_TEMPLATE
    template = tokenizer.chat_template if by_tokenizer else chat_template(get_template(name), after_image(tokenizer))
    processor = LlavaProcessor(
        image_processor=image_processor(own.tower, own.aspect_ratio),
        tokenizer=tokenizer,
        patch_size=own.tower.config["vision_cfg"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(str(directory))
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    GenerationConfig(**ids).save_pretrained(str(directory))


def after_image(tokenizer: Any) -> str:
    """The separator between `<image>` and the text with which transformers gives our token ids.

    It is a line break, for some tokenizers after a blank. LLaVA tokenizes the text after an image as the beginning of
    a text, to which Llama's tokenizers add a blank piece. transformers tokenizes it as a continuation, and there some
    of them add none.
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

    It renders messages whose content is a text or a list of text and image parts. `separator` stands between an image
    and the text of its message.
    """
    if template.caption:
        return None

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    fields = ("system", "first_text_prefix", "between_rounds", "user_start", "user_end", "answer_marker")
    strings = {name: quoted(getattr(template, name)) for name in (*fields, "answer_start", "answer_end")}
    trim = "{%- set parts.text = parts.text | trim -%}" if template.strip else ""
    text = (
        "{%- set image = '" + DEFAULT_IMAGE_TOKEN + "' -%}"
        "{%- for message in messages -%}"
        "{%- set parts = namespace(image='', text='') -%}"
        "{%- if message['content'] is string -%}{%- set parts.text = message['content'] -%}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{%- set parts.image = image + " + quoted(separator) + " -%}"
        "{%- else -%}{%- set parts.text = parts.text + part['text'] -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}" + trim + "{%- if loop.first -%}{{ SYSTEM }}{%- endif -%}"
        "{%- if message['role'] == 'user' -%}"
        "{%- if not loop.first -%}{{ BETWEEN_ROUNDS }}{%- endif -%}"
        "{{ USER_START }}{%- if loop.first -%}{{ FIRST_TEXT_PREFIX }}{%- endif -%}"
        "{{ parts.image + parts.text }}{{ USER_END }}"
        "{%- else -%}{{ ANSWER_MARKER + ANSWER_START + parts.text + ANSWER_END }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ ANSWER_MARKER }}{%- endif -%}"
    )
    for name in sorted(strings, key=len, reverse=True):
        text = text.replace(name.upper(), strings[name])
    return text
