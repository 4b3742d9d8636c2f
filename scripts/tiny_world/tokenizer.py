"""The small tokenizer: byte-pair encoding with the conventions of Llama's SentencePiece model.

<unk> is 0, <s> 1, </s> 2 and the 256 bytes are 3 to 258; characters and merges follow. A text starts with <s> and a
space piece, each digit is a piece, and a character without a piece is spelled in bytes.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from llava_mole.conversation import get_template
from llava_mole.data.prepare.sources.tiny.samples import Sample
from scripts.tiny_world.language import pretraining_item

VOCABULARY = 1024
WORDS = (
    "black blue brown gray green pink red white one two three four small large low high bar upper lower yes no "
    "first second third last in not has list"
).split()
"""Words that are one piece each, as the names and the other colours are: facts and drills are made of them."""
PROMPTS = ("plain", "vicuna_v1", "v1", "llava_v1", "llava_llama_2", "chatml_direct", "mpt")
"""Templates whose words the vocabulary covers; `v1` repeats `vicuna_v1`, as for the shipped tokenizer."""
SPACE = "\u2581"
"""SentencePiece's visible space."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def training_lines(samples: Iterable[Sample], items: int, seed: int) -> Iterator[str]:
    """Yield lines of text; a line starts with a space unless it follows a newline in a prompt."""
    for name in PROMPTS:
        template = get_template(name)
        for _ in range(300):
            yield " " + " ".join((template.system, template.user_start, template.answer_marker)).replace("\n", " ")
    for _ in range(300):
        yield " " + " ".join(WORDS)
    for sample in samples:
        yield " " + sample.caption
        for question in sample.questions:
            yield question.text
            yield " " + question.answer
    rng = Random(f"{seed}-tokenizer")
    for _ in range(items):
        item = pretraining_item(rng)
        yield " " + " ".join(item.reading)
        for asked, answer in item.turns:
            yield asked
            yield " " + answer


def train(lines: Iterable[str], vocabulary: int = VOCABULARY) -> Any:
    """Train on `lines`. Returns a `tokenizers.Tokenizer`; the same lines give the same tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace("\n", " ")
    # As in SentencePiece, a piece has neither letters with punctuation nor two digits.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation("isolated")]
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(SPACE, "never"), *splits])
    reserved = 3 + len(BYTES)
    printable = [chr(code) for code in range(33, 127)] + [SPACE]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - reserved + 1,
        special_tokens=["<unk>"],
        initial_alphabet=printable,
        max_token_length=16,
        show_progress=False,
    )
    learner.train_from_iterator(lines, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted((rank, piece) for piece, rank in learned["vocab"].items() if piece != "<unk>")
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *(p for _, p in pieces)])}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(SPACE, "first"), *splits])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def save(tokenizer: Any, folder: Path, context_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
