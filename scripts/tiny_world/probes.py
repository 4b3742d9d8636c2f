"""Probes: what linear classifiers read from the tower's patch tokens, on images that the tower was not trained on."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from llava_mole.data.prepare.sources.tiny import biomedicine, document, general
from llava_mole.data.prepare.sources.tiny.samples import Sample

Tokens = Callable[[Sequence[Sample]], torch.Tensor]
"""Samples -> patch tokens `[N, 16, width]`, in the order of the 4 x 4 patches."""
SIDE = 4
STEPS = 150


def classify(fit: torch.Tensor, fit_labels: Sequence[str], test: torch.Tensor) -> list[str]:
    """Fit a linear classifier (softmax regression) on `fit` `[N, D]` and return its answers for `test` `[M, D]`."""
    answers = sorted(set(fit_labels))
    target = torch.tensor([answers.index(label) for label in fit_labels])
    mean, deviation = fit.mean(0), fit.std(0) + 1e-4
    fit, test = (fit - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(fit.shape[1], len(answers), requires_grad=True)
    bias = torch.zeros(len(answers), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=3e-3, weight_decay=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(fit @ weight + bias, target).backward()
        optimizer.step()
    with torch.no_grad():
        return [answers[index] for index in (test @ weight + bias).argmax(1).tolist()]


def share(found: Sequence[str], true: Sequence[str]) -> float:
    """Return the share of answers that are right."""
    return sum(one == other for one, other in zip(found, true, strict=True)) / len(true)


def probe_shapes(tokens: Tokens, split: str, most: int) -> dict[str, float]:
    """Probe shape and colour of easy-VQA's images from all 16 tokens.

    `shape_yes_no` asks about every image once for its shape and once for another: the answer is yes if the shape's
    probe names the shape that is asked for.
    """
    fit, test = general.load("train", most)[0], general.load(split, most)[0]
    read, seen = tokens(fit).flatten(1), tokens(test).flatten(1)
    truth = [[general.measure(sample.image) for sample in samples] for samples in (fit, test)]
    measured = {}
    for part, name in enumerate(("shape", "color")):
        found = classify(read, [facts[part] for facts in truth[0]], seen)
        true = [facts[part] for facts in truth[1]]
        measured[name] = share(found, true)
        if name == "shape":
            rng = Random(0)
            others = [rng.choice([shape for shape in general.SHAPES if shape != right]) for right in true]
            said = [one == right for one, right in zip(found, true, strict=True)]
            denied = [one != other for one, other in zip(found, others, strict=True)]
            measured["shape_yes_no"] = (sum(said) + sum(denied)) / (2 * len(true))
    return measured


def probe_documents(tokens: Tokens, most: int, taken: set[bytes]) -> dict[str, float]:
    """Probe names, values and colours from the one token of the patch that shows them.

    `bound_value` reads a bar's value from the token of its name, which shows only the name.
    """
    rng = Random("probe")
    pages = []
    while len(pages) < 2 * most:
        page = document.draw_document(rng)
        pixels = document.render(page).tobytes()
        if pixels not in taken:
            taken.add(pixels)
            pages.append(page)
    read = tokens([Sample("", document.render(page), "", (), ()) for page in pages])
    cells: dict[str, list[tuple[int, int, str]]] = {}  # what is probed -> (page, patch, answer)
    for number, page in enumerate(pages):
        for index, (name, value) in enumerate(zip(page.names, page.values, strict=True)):
            if page.kind == "table":
                row = SIDE * (index + 1)
                asked = [("table_name", row, name), ("table_value", row + 2, str(value))]
            else:
                column = page.columns[index]
                asked = [
                    ("chart_value", column, str(value)),
                    ("chart_color", 2 * SIDE + column, page.colours[index]),
                    ("chart_name", 3 * SIDE + column, name),
                    ("bound_value", 3 * SIDE + column, str(value)),
                ]
            for kind, patch, answer in asked:
                cells.setdefault(kind, []).append((number, patch, answer))
    measured = {}
    for kind, found in sorted(cells.items()):
        fit, test = ([cell for cell in found if (cell[0] < most) == first] for first in (True, False))
        features = [torch.stack([read[number, patch] for number, patch, _ in part]) for part in (fit, test)]
        answers = classify(features[0], [answer for *_, answer in fit], features[1])
        measured[kind] = share(answers, [answer for *_, answer in test])
    return measured


def probe_tissue(tokens: Tokens, split: str, most: int) -> dict[str, float]:
    """Probe every finding from all 16 tokens. Returns the worst and the mean accuracy."""
    fit, test = (biomedicine.generate(most, part, Random(f"probe-{part}")) for part in ("train", split))
    read = [tokens(samples).flatten(1) for samples in (fit, test)]
    accuracies = []
    for text, _ in biomedicine.QUESTIONS.values():
        rows: list[list[int]] = []
        labels: list[list[str]] = []
        for samples in (fit, test):
            pairs = [(row, q.answer) for row, sample in enumerate(samples) for q in sample.questions if q.text == text]
            rows.append([row for row, _ in pairs])
            labels.append([answer for _, answer in pairs])
        if rows[1] and len(set(labels[0])) > 1:
            accuracies.append(share(classify(read[0][rows[0]], labels[0], read[1][rows[1]]), labels[1]))
    return {"tissue_worst": min(accuracies), "tissue_mean": sum(accuracies) / len(accuracies)} if accuracies else {}


def probe(encode: Callable[[Any], torch.Tensor], split: str, most: int, taken: set[bytes]) -> dict[str, float]:
    """Run all probes.

    Args:
        encode: uint8 pixels `[N, 3, 64, 64]` -> patch tokens `[N, 16, width]`.
        split: The held-out split whose images test the probes (`val` or `test`).
        most: Most images of a domain to fit and to test a probe on.
        taken: Pixels of documents that must not be used.

    Returns:
        Accuracies, 0 to 1.
    """
    from scripts.tiny_world.tower import to_pixels

    def tokens(samples: Sequence[Sample]) -> torch.Tensor:
        pixels = to_pixels(samples)
        with torch.no_grad():
            return torch.cat([encode(pixels[start : start + 256]) for start in range(0, len(pixels), 256)])

    return probe_shapes(tokens, split, most) | probe_documents(tokens, most, taken) | probe_tissue(tokens, split, most)
