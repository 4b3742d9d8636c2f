"""The words of patches are those that the drawing puts there, and the loss equals a naive loop."""

from random import Random

import pytest
import torch
import torch.nn.functional as F

from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny.samples import Sample
from scripts.tiny_world import patches


def sample_of(page):
    return Sample("", document.render(page), "", document.facts(page), ())


@pytest.mark.parametrize("seed", range(4))
def test_words_of_documents_stand_where_they_are_drawn(seed):
    rng = Random(seed)
    for _ in range(50):
        page = document.draw_document(rng)
        expected = {}
        for index, (name, value) in enumerate(zip(page.names, page.values, strict=True)):
            if page.kind == "table":
                expected[4 * (index + 1)], expected[4 * (index + 1) + 2] = {name}, {str(value)}
            else:
                column, colour = page.columns[index], {page.colours[index]}
                expected |= {column: {str(value)}, 8 + column: colour, 12 + column: {name}}
                # A bar stands on pixel row 48; the second row of patches begins at 32.
                expected |= {4 + column: colour} if value * document.UNIT > 18 else {}
        if page.kind == "table":
            expected |= {0: {page.title.lower()}, 1: {page.title.lower()}}
        found = patches.words_of(sample_of(page))
        assert found == [expected.get(patch, {patches.BLANK}) for patch in range(16)]


def test_words_of_shapes_stand_where_the_shape_is():
    seen = 0
    for shape in general.load("train", 20)[0]:
        _, _, form, colour, _ = (fact.split()[-1] for fact in shape.facts)
        found = patches.words_of(shape)
        shown = [words for words in found if words != {patches.BLANK}]
        seen += bool(shown)  # a small shape may cover no patch to a quarter
        assert all(words == {form, colour} for words in shown)
        box = shape.image.convert("L").point(lambda value: 255 * (value < 200)).getbbox()
        for patch, words in enumerate(found):
            left, top = patch % 4 * 16, patch // 4 * 16
            if words != {patches.BLANK} and box:
                assert left < box[2]
                assert left + 16 > box[0]
                assert top < box[3]
                assert top + 16 > box[1]
    assert seen > 15


def test_nothing_is_said_about_tissue():
    assert patches.words_of(biomedicine.generate(1, "train", Random(0))[0]) == []


def test_loss_equals_a_naive_loop():
    rng = Random(1)
    samples = [sample_of(document.draw_document(rng)) for _ in range(3)] + biomedicine.generate(1, "train", rng)
    torch.manual_seed(0)
    loss = patches.PatchWords(samples, 8).double()
    tokens = torch.randn(4, 16, 8, dtype=torch.float64)
    rows = torch.tensor([3, 2, 0, 1])
    computed = loss(tokens, rows, torch.Generator().manual_seed(5))
    chance = torch.rand(64, generator=torch.Generator().manual_seed(5)).view(4, 16)
    terms = []
    for place, row in enumerate(rows.tolist()):
        for patch, words in enumerate(patches.words_of(samples[row])):
            if words == {patches.BLANK} and chance[place, patch] >= patches.BLANKS:
                continue
            token = tokens[place, patch]
            token = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
            scores = [patches.TEMPERATURE * F.cosine_similarity(token, vector, dim=0).item() for vector in loss.vectors]
            wrong = [torch.tensor(s).exp() for word, s in zip(loss.words, scores, strict=True) if word not in words]
            for word in words:
                right = torch.tensor(scores[loss.words.index(word)]).exp()
                terms.append(-(right / (right + sum(wrong))).log().item())
    assert computed.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
