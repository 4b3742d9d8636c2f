"""The base model and the examples of `llava-mole compose`, and the loss of the one on the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_mole.common.errors import CheckpointError, DataError
from llava_mole.config import load_config
from llava_mole.constants import IGNORE_INDEX
from llava_mole.data.anyres import join_tiles
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.collator import Example, collate
from llava_mole.data.images import load_image
from llava_mole.data.json_stream import iterate_json
from llava_mole.data.store import read_records
from llava_mole.data.tokenization import encode_record, load_tokenizer
from llava_mole.model.builder import CONFIG_FILE, LoadedModel, load_pretrained_model, locate_parts, select_device
from llava_mole.model.checkpoint import read_manifest
from llava_mole.model.language_model import check_vocabulary, load_language_model, longest_sequence
from llava_mole.model.llava_arch import LlavaMole


@dataclass
class Base:
    """The frozen model that the LoRAs adapt."""

    causal_lm: Any
    """Without adapters; its linears are those that LoRAs name."""
    fingerprint: str
    """Of the causal LM's weights."""
    directory: Path
    """Of the causal LM."""
    tokenizer: Any
    """A transformers tokenizer; a `LoadedModel` has its own."""
    loaded: LoadedModel | None
    """The multimodal model of a checkpoint of this package, whose language model is `causal_lm`; else None."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Path -> (out, in) of every linear that a LoRA may adapt: all but the head."""
        head = self.causal_lm.get_output_embeddings()
        return {
            name: (module.out_features, module.in_features)
            for name, module in self.causal_lm.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }

    def losses(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean cross-entropy of each example's supervised tokens, float32 `[B]`; `model` is `causal_lm`, adapted."""
        device = self.causal_lm.get_input_embeddings().weight.device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        shifted_BL = torch.full_like(moved["labels"], IGNORE_INDEX)
        shifted_BL[:, :-1] = moved["labels"][:, 1:]
        mask_BL = shifted_BL != IGNORE_INDEX
        targets_n = shifted_BL[mask_BL]
        inputs = {"input_ids": moved["input_ids"], "attention_mask": moved["attention_mask"]}
        if self.loaded is not None:
            multimodal = self.loaded.model
            multimodal.language_model = model
            losses_n = multimodal(
                **inputs,
                images=moved["images"],
                feature_index=moved["feature_index"],
                image_grids=moved["image_grids"],
                loss_mask=mask_BL,
                targets=targets_n,
            )
        else:
            logits_nV = model(**inputs, use_cache=False).logits[mask_BL]
            losses_n = torch.nn.functional.cross_entropy(logits_nV.float(), targets_n, reduction="none")
        zeros_B = losses_n.new_zeros(mask_BL.shape[0])
        sums_B = zeros_B.index_add(0, moved["sample_index"][mask_BL], losses_n)
        return sums_B / mask_BL.sum(dim=1)


def open_run(path: Path, *, model_base: Path | None, vision_tower: Path | None, device: str, dtype: str) -> Base:
    """The base of a run or checkpoint of this package: all of it but the adapter.

    Raises:
        CheckpointError: it does not verify, is of stage `pretrain`, or its parts are not those it was trained on.
        WeightsError: a part is missing.
    """
    loaded = load_pretrained_model(
        path,
        model_base=None if model_base is None else str(model_base),
        vision_tower=None if vision_tower is None else str(vision_tower),
        device=device,
        dtype=dtype,
    )
    manifest = read_manifest(loaded.path)
    if manifest["stage"] == "pretrain":
        raise CheckpointError(
            f"{path} is of stage 'pretrain', whose prompts are captions; give a checkpoint of stage 'finetune'"
        )
    model: LlavaMole = loaded.model
    if loaded.adapter != "none":
        model.language_model = model.language_model.unload()
    config = load_config(loaded.path / CONFIG_FILE).model
    locate_parts(config, manifest, loaded.path, model_base, vision_tower)
    fingerprint = manifest["fingerprints"]["language_model"]
    return Base(model.causal_lm, fingerprint, Path(config.language_model), loaded.tokenizer.hf, loaded)


def open_causal_lm(path: Path, *, device: str, dtype: str) -> Base:
    """A Hugging Face causal LM as the base. Raises WeightsError if it does not load or its tokenizer does not fit."""
    model, fingerprint = load_language_model(str(path))
    tokenizer = load_tokenizer(str(path))
    check_vocabulary(model, tokenizer, path)
    model.to(select_device(device), getattr(torch, dtype)).eval()
    return Base(model, fingerprint, path, tokenizer, None)


def read_examples(file: Path, base: Base, image_folder: Path | None, batch_size: int) -> list[dict[str, Any]]:
    """The batches of an example file.

    With a checkpoint of this package as the base, the file holds records in LLaVA's format (docs/data.md), tokenized
    as in training. With a causal LM, each value is `{"prompt": text, "completion": text}`: the loss is that of the
    completion and of the end token after it.

    Args:
        file: JSONL, or a JSON list.
        base: the base model.
        image_folder: where image paths begin; None takes the file's folder.
        batch_size: examples of a forward pass.

    Raises:
        DataError: the file, a record or an image is wrong, or an example is longer than the model's context; the
            message starts with `file:line`.
    """
    if base.loaded is not None:
        examples = list(_records(file, base.loaded, image_folder or file.parent))
        pad = base.loaded.tokenizer.pad_token_id
    else:
        examples = list(_completions(file, base))
        pad = 0  # padding follows from the mask, not from the id
    if not examples:
        raise DataError(f"{file} holds no example; add some")
    return [
        collate(examples[start : start + batch_size], pad_token_id=pad) for start in range(0, len(examples), batch_size)
    ]


def count_examples(batches: Sequence[dict[str, Any]]) -> int:
    """Examples in the batches."""
    return sum(len(batch["ids"]) for batch in batches)


def _records(file: Path, loaded: LoadedModel, image_folder: Path) -> Iterator[Example]:
    template = resolve_template(loaded.template, loaded.tokenizer)
    processor = loaded.image_processor
    for record in read_records(file, "examples"):
        try:
            shown = [
                processor.tiles(load_image(path, image_folder, modes=processor.modes), path) for path in record.images
            ]
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from None
        images, index, grids = join_tiles(shown) if shown else (None, None, None)
        tokens = [loaded.model.num_image_tokens if each.shows is None else len(each.shows) for each in shown]
        encoded = encode_record(record, template, loaded.tokenizer, tokens, loaded.context_length)
        ids, labels = encoded.input_ids, encoded.labels
        yield Example(record.id, "examples", 0, ids, labels, images, feature_index=index, image_grids=grids)


def _completions(file: Path, base: Base) -> Iterator[Example]:
    tokenizer = base.tokenizer
    longest = longest_sequence(base.causal_lm.config)
    for value, line in iterate_json(file):
        where = f"{file}:{line}"
        texts = [value.get(key) for key in ("prompt", "completion")] if isinstance(value, dict) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts) or not texts[1]:
            raise DataError(
                f'{where}: an example is {{"prompt": text, "completion": text}} with a completion that is not empty; '
                "records in LLaVA's format need --model-path"
            )
        prompt = tokenizer(texts[0])["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and prompt and prompt[-1] == end:  # tokenizers that end every text
            prompt = prompt[:-1]
        answer = tokenizer(texts[1], add_special_tokens=False)["input_ids"] + ([] if end is None else [end])
        if not prompt:
            raise DataError(f"{where}: the prompt has no token, so nothing precedes the completion; give a prompt")
        ids = prompt + answer
        if longest is not None and len(ids) > longest:
            raise DataError(f"{where}: {len(ids)} tokens; the model has {longest} positions, so shorten the example")
        yield Example(where, "examples", 0, ids, [IGNORE_INDEX] * len(prompt) + answer, None)
