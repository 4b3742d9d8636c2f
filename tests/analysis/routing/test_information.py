"""Mutual information of made-up routers, and likeness of made-up experts, against definitions."""

import math

import pytest
import torch

from llava_mole.analysis.routing.information import mutual_information, of_samples, of_tokens
from llava_mole.analysis.routing.similarity import Projection, weight_cosines
from llava_mole.analysis.routing.tokens import form_of

SAMPLES, LENGTH = 60, 20


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sample of every token, the source of every sample and of every token."""
    sample = torch.arange(SAMPLES).repeat_interleave(LENGTH)
    source = torch.arange(SAMPLES) % 3
    return sample, source, source[sample]


def test_a_router_by_source_knows_all_of_it_and_a_random_one_nothing(generator: torch.Generator) -> None:
    sample, source, of_token = tokens()
    random = torch.randint(3, of_token.shape, generator=generator)
    expert = torch.stack([of_token, (of_token + 1) % 3, random, torch.zeros_like(random)])
    found = of_samples(expert, sample, source, experts=3, permutations=99, generator=generator)
    assert found.class_entropy == pytest.approx(math.log(3))
    assert found.raw.tolist()[:2] == pytest.approx([math.log(3)] * 2)
    shares = found.values()["share"]
    assert shares[:2] == pytest.approx([1, 1])
    assert abs(shares[2]) < 0.01
    assert shares[3] == pytest.approx(0, abs=1e-12)
    assert found.p_value.tolist()[:2] == pytest.approx([0.01, 0.01])
    assert float(found.p_value[2]) > 0.01
    assert float(found.p_value[3]) == 1


def test_samples_that_stick_together_do_not_look_like_a_relation(generator: torch.Generator) -> None:
    """Every sample has an expert of its own choice: shuffled tokens would hide how much chance there is in that."""
    sample, source, _ = tokens()
    expert = torch.randint(3, (SAMPLES,), generator=generator)[sample].unsqueeze(0)
    found = of_samples(expert, sample, source, experts=3, permutations=200, generator=generator)
    assert float(found.estimate.abs()) < 0.05
    assert float(found.baseline) > 0.02
    assert float(found.p_value) > 0.05


def test_kinds_of_tokens_are_compared_within_their_sample(generator: torch.Generator) -> None:
    sample, _, _ = tokens()
    kind = (torch.arange(len(sample)) % LENGTH < 8).long()
    by_sample = (sample % 2).unsqueeze(0)
    expert = torch.cat([kind.unsqueeze(0), by_sample, torch.randint(2, (1, len(sample)), generator=generator)])
    found = of_tokens(expert, sample, kind, experts=2, permutations=99, generator=generator)
    shares = found.values()["share"]
    assert shares[0] == pytest.approx(1)
    assert shares[1] == pytest.approx(0, abs=1e-9)
    assert abs(shares[2]) < 0.01
    assert float(found.p_value[0]) == pytest.approx(0.01)


def test_mutual_information_is_the_definition() -> None:
    joint = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    p = joint / 8
    expected = sum(
        float(p[k, c] * math.log(p[k, c] / (p[k].sum() * p[:, c].sum())))
        for k in range(2)
        for c in range(2)
        if p[k, c] > 0
    )
    assert float(mutual_information(joint)) == pytest.approx(expected)


def naive_cka(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one - one.mean(dim=0), other - other.mean(dim=0)
    return float((one.T @ other).square().sum() / ((one.T @ one).norm() * (other.T @ other).norm()))


def test_likeness_equals_full_matrices() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 7).double()
    a[1], b[1] = a[0] * 2, b[0] * -3  # the same update but for its sign and size
    projection = Projection("p", 0, torch.nn.Identity(), a, b)
    x = torch.randn(4, 10, 5).double() + 1
    projection.add(x[:2])
    projection.add(x[2:])
    updates = [x.flatten(0, 1) @ a[k].T @ b[k] for k in range(3)]
    cka, cosine = projection.cka(), weight_cosines(a, b)
    for i in range(3):
        for j in range(3):
            assert float(cka[i, j]) == pytest.approx(naive_cka(updates[i], updates[j]))
            weights = [(b[k].T @ a[k]).flatten() for k in (i, j)]
            assert float(cosine[i, j]) == pytest.approx(float(torch.cosine_similarity(*weights, dim=0)))
    assert float(cka[0, 1]) == pytest.approx(1)
    assert float(cosine[0, 1]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("piece", "text", "form"),
    [
        ("▁red", " red", "word"), ("12", "12", "digit"), ("▁?", " ?", "punctuation"), ("+", "+", "punctuation"),
        ("</s>", "</s>", "other"), ("<0x0A>", "\n", "other"), ("▁", " ", "other"), ("a1", "a1", "other"),
        ("<", "<", "punctuation"), ("Ü", "Ü", "word"),
    ],
)  # fmt: skip
def test_forms(piece: str, text: str, form: str) -> None:
    assert form_of(piece, text) == form
