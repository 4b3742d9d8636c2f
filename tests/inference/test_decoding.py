"""From ids to the answer's text: end marks, stop texts, unfinished characters."""

from pathlib import Path

import pytest
import torch
from worlds.tiny_models import make_tokenizer

from llava_mole.data.tokenization import HFTextTokenizer, load_tokenizer
from llava_mole.inference.decoding import AnswerDecoder, RowSampler, RowStop

EOS = 2
TEXTS = [
    "It is red.",
    "  It is  blue \n\n or green ",
    "naïve café 你好 👍🏽 done",
    "one two 👍",
    "USER: a\nUSE b",
    "",
    " ",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTextTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return HFTextTokenizer(load_tokenizer(str(folder)))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stops", [(), ("\n",), ("USER:", "👍"), (" or",)])
def test_stable_texts_grow_into_the_final_one(tokenizer: HFTextTokenizer, text: str, stops: tuple[str, ...]) -> None:
    decoder = AnswerDecoder(tokenizer, [EOS], stops)
    ids = [*tokenizer.encode_with_offsets(text)[0], EOS, *tokenizer.encode_with_offsets("after")[0]]
    final = decoder.final(ids)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert final == text[: min(ends, default=len(text))].strip()
    seen = ""
    for n in range(len(ids) + 1):
        stable = decoder.stable(ids[:n])
        assert final.startswith(stable)
        assert stable.startswith(seen) or seen.startswith(stable)
        seen = max(seen, stable, key=len)


def test_rows_are_sampled_by_their_probabilities() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7], [0.4, 0.0, 0.6, 0.0]]).log()
    sampler = RowSampler([1, 2])
    drawn = torch.stack([sampler(torch.zeros(2, 0), logits).argmax(dim=-1) for _ in range(4000)])
    for row in range(2):
        shares = drawn[:, row].bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(shares, logits[row].exp(), rtol=0, atol=0.03)
    alone = RowSampler([2])
    assert [int(alone(torch.zeros(1, 0), logits[1:]).argmax()) for _ in range(50)] == drawn[:50, 1].tolist()


def test_text_is_stable_before_the_end(tokenizer: HFTextTokenizer) -> None:
    decoder = AnswerDecoder(tokenizer, [EOS], ["\n"])
    ids = tokenizer.encode_with_offsets("It is red or green")[0]
    assert decoder.stable(ids).startswith("It is red or")


def test_a_character_whose_bytes_never_complete_stays(tokenizer: HFTextTokenizer) -> None:
    ids = tokenizer.encode_with_offsets("yes 👍")[0][:-1]
    decoder = AnswerDecoder(tokenizer, [EOS], [])
    assert decoder.stable(ids) == "yes"
    assert decoder.final(ids).startswith("yes \ufffd")


def test_empty_stop_texts_stop_nothing(tokenizer: HFTextTokenizer) -> None:
    ids = tokenizer.encode_with_offsets("It is red")[0]
    decoder = AnswerDecoder(tokenizer, [EOS], [""])
    assert decoder.final(ids) == "It is red"
    assert not decoder.is_done(ids)


def test_rows_stop_by_themselves(tokenizer: HFTextTokenizer) -> None:
    import torch

    one, stop = tokenizer.encode_with_offsets("one two")[0], tokenizer.encode_with_offsets("one\n")[0]
    length = max(len(one), len(stop))
    rows = torch.tensor([[0] * (length - len(ids)) + ids for ids in (one, stop, one, one)])
    criterion = RowStop(AnswerDecoder(tokenizer, [EOS], ["\n"]), limits=[length + 1, length])
    assert criterion(rows, None).tolist() == [False, True, True, True]  # two samples with two beams each
    criterion.cancelled = True
    assert criterion(rows, None).tolist() == [True] * 4
