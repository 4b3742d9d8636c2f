"""Llama's tokenizer rules over a bare SentencePiece model, with character offsets.

The recorded results were tokenized by these rules; current Hugging Face tokenizers differ from them in rare cases (runs
of spaces), so the comparison goes through this wrapper.
"""

import re
from collections.abc import Sequence

import sentencepiece
from worlds import golden_cases

SPACE = "\u2581"  # how SentencePiece writes a space


class LlamaSentencePiece:
    """A `TextTokenizer` with the slow LlamaTokenizer's rules.

    `legacy`: every stretch of text between special tokens gets SentencePiece's leading-space piece. Otherwise only
    a stretch that begins the text does.
    """

    def __init__(self, *, legacy: bool, add_bos_token: bool = True, added_tokens: Sequence[str] = ()) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(golden_cases.read_bytes("tokenizer.model"))
        self._legacy = legacy
        self.bos_token_id = self._model.bos_id() if add_bos_token else None
        self.eos_token_id = self._model.eos_id()
        self.pad_token_id = self._model.unk_id()
        own = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        self._special = {self._model.IdToPiece(token): token for token in own}
        self._special |= {text: self._model.GetPieceSize() + index for index, text in enumerate(added_tokens)}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for part in self._split.split(text):
            token = self._special.get(part)
            if token is not None:
                ids.append(token)
                offsets.append((position, position + len(part)))
            elif part:
                leading_space = self._legacy or position == 0
                pieces = self._pieces(part, leading_space)
                ids += [self._model.PieceToId(piece) for piece in pieces]
                offsets += [(position + a, position + b) for a, b in _offsets(pieces, part, leading_space)]
            position += len(part)
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds([token for token in ids if token < self._model.GetPieceSize()])

    def _pieces(self, text: str, leading_space: bool) -> list[str]:
        if leading_space:
            return self._model.EncodeAsPieces(text)
        # No piece holds a newline, so nothing is joined across this one, and it takes the leading space.
        pieces = self._model.EncodeAsPieces("\n" + text)
        assert pieces[:2] == [SPACE, "<0x0A>"]
        return pieces[2:]


def _offsets(pieces: list[str], text: str, leading_space: bool) -> list[tuple[int, int]]:
    """Each piece's range in `text`; the leading space has no width, the bytes of one character share its range."""
    offsets = []
    position = -1 if leading_space else 0
    byte = 0
    for piece in pieces:
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            offsets.append((position, position + 1))
            byte += 1
            if byte == len(text[position].encode()):
                position, byte = position + 1, 0
        else:
            offsets.append((max(position, 0), position + len(piece)))
            position += len(piece)
    assert position == len(text)
    return offsets
