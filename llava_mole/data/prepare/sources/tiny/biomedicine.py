"""The biomedicine domain: patches of a real immunohistochemistry photograph, with PathVQA-style questions.

The photograph (colonic glands, DAB brown with hematoxylin blue; 512 x 512; shipped with scikit-image) is cut into three
regions, one for training, one for validation and one for testing, with unused strips between them. Every answer is
measured: colour deconvolution (Ruifrok and Johnston, 2001; `skimage.color.rgb2hed`), then shares of pixels above fixed
thresholds. A question is asked only if the measurement lies clearly on one side of every limit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_mole.data.prepare.sources.tiny.samples import IMAGE_SIZE, Question, Sample


class Region(NamedTuple):
    """A rectangle of the photograph in pixels; `bottom` and `right` are excluded."""

    top: int
    bottom: int
    left: int
    right: int


REGIONS: Mapping[str, Region] = {
    "train": Region(0, 344, 0, 416),
    "val": Region(0, 344, 432, 512),
    "test": Region(360, 512, 0, 512),
}
"""Where a split's patches are cut."""

DAB_LEVEL = 0.05
"""A pixel with more DAB is DAB positive (optical density, in units of `rgb2hed`)."""
HEMATOXYLIN_LEVEL = 0.03
"""A pixel with more hematoxylin that is not DAB positive belongs to a blue nucleus."""
PALE_LEVEL = 215
"""A pixel is unstained when its darkest channel (0-255) is above this."""

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")


@dataclass(frozen=True)
class Measurement:
    """Shares of a patch's area, 0 to 1."""

    dab: float
    nuclei: float
    pale: float
    quadrants: tuple[float, float, float, float]
    """DAB-positive share of each quadrant, in the order of `QUADRANTS`."""


def photograph() -> np.ndarray:
    """Load the photograph, uint8 `[512, 512, 3]`."""
    from skimage import data

    return data.immunohistochemistry()


def measure(patch: np.ndarray) -> Measurement:
    """Measure a patch, uint8 `[H, W, 3]` with even H and W."""
    from skimage.color import rgb2hed

    stains = rgb2hed(patch)
    dab = stains[..., 2] > DAB_LEVEL
    nuclei = (stains[..., 0] > HEMATOXYLIN_LEVEL) & ~dab
    pale = patch.min(axis=-1) > PALE_LEVEL
    half_y, half_x = patch.shape[0] // 2, patch.shape[1] // 2
    parts = (dab[:half_y, :half_x], dab[:half_y, half_x:], dab[half_y:, :half_x], dab[half_y:, half_x:])
    a, b, c, d = (float(part.mean()) for part in parts)
    return Measurement(float(dab.mean()), float(nuclei.mean()), float(pale.mean()), (a, b, c, d))


def grade(value: float, *grades: tuple[str, float, float]) -> str | None:
    """Return the name of the (name, low, high) interval that contains `value`; None in a gap between intervals."""
    return next((name for name, low, high in grades if low <= value <= high), None)


def findings(m: Measurement) -> dict[str, str]:
    """Return the findings that the measurement clearly supports, as kind -> short answer."""
    upper_left, upper_right, lower_left, lower_right = m.quadrants
    order = sorted(m.quadrants)
    found = {
        "dab_present": grade(m.dab, ("no", 0, 0.02), ("yes", 0.1, 1)),
        "dab_half": grade(m.dab, ("no", 0, 0.42), ("yes", 0.58, 1)),
        "dab_area": grade(m.dab, ("small", 0.05, 0.25), ("medium", 0.37, 0.63), ("large", 0.75, 1)),
        "dab_where": QUADRANTS[m.quadrants.index(order[-1])] if order[-1] - order[-2] >= 0.15 else None,
        "left_browner": grade(upper_left + lower_left - upper_right - lower_right, ("no", -2, -0.3), ("yes", 0.3, 2)),
        "upper_browner": grade(upper_left + upper_right - lower_left - lower_right, ("no", -2, -0.3), ("yes", 0.3, 2)),
        "nuclei": grade(m.nuclei, ("low", 0, 0.045), ("medium", 0.075, 0.12), ("high", 0.16, 1)),
        "nuclei_visible": grade(m.nuclei, ("no", 0, 0.02), ("yes", 0.08, 1)),
        "stain": grade(m.dab - m.nuclei, ("hematoxylin", -1, -0.06), ("DAB", 0.12, 1)),
        "pale": grade(m.pale, ("no", 0, 0.15), ("yes", 0.35, 1)),
    }
    return {kind: answer for kind, answer in found.items() if answer is not None}


QUESTIONS: Mapping[str, tuple[str, str]] = {
    "dab_present": ("Is DAB staining present?", "presence"),
    "dab_half": ("Is more than half of the patch DAB positive?", "area"),
    "dab_area": ("How large is the DAB positive area?", "area"),
    "dab_where": ("Where is the DAB staining strongest?", "place"),
    "left_browner": ("Is the left half browner than the right half?", "comparison"),
    "upper_browner": ("Is the upper half browner than the lower half?", "comparison"),
    "nuclei": ("How dense are the blue nuclei?", "density"),
    "nuclei_visible": ("Are blue nuclei visible?", "presence"),
    "stain": ("Which stain covers the larger area?", "stain"),
    "pale": ("Is a large area unstained?", "area"),
}
"""Kind of finding -> question and its category."""


def caption(found: Mapping[str, str], rng: Random) -> str:
    """Describe the findings in a few plain sentences."""
    parts = []
    if "dab_area" in found:
        parts.append(f"a {found['dab_area']} DAB positive area")
    elif "dab_present" in found:
        parts.append({"yes": "DAB staining", "no": "no DAB staining"}[found["dab_present"]])
    if "nuclei" in found:
        parts.append(f"{found['nuclei']} density of blue nuclei")
    if "pale" in found:
        parts.append({"yes": "a large unstained area", "no": "little unstained area"}[found["pale"]])
    opening = rng.choice(("A tissue patch", "A stained tissue section"))
    text = opening + (" with " + ", ".join(parts) if parts else "") + "."
    if "stain" in found:
        text += f" {found['stain']} covers the larger area."
    if "dab_where" in found:
        text += f" The DAB staining is strongest in the {found['dab_where']}."
    sides = [
        {"yes": first, "no": second}[found[kind]]
        for kind, first, second in (("left_browner", "left", "right"), ("upper_browner", "upper", "lower"))
        if kind in found
    ]
    if sides:
        text += f" The {' and the '.join(side + ' half' for side in sides)} is browner."
    return text


def facts(found: Mapping[str, str]) -> tuple[str, ...]:
    """Return short true sentences, one for each finding."""
    wording = {
        "dab_present": {"yes": "DAB staining is present", "no": "no DAB staining"},
        "dab_half": {"yes": "more than half is brown", "no": "less than half is brown"},
        "left_browner": {"yes": "the left half is browner", "no": "the right half is browner"},
        "upper_browner": {"yes": "the upper half is browner", "no": "the lower half is browner"},
        "nuclei_visible": {"yes": "blue nuclei are visible", "no": "no blue nuclei"},
        "pale": {"yes": "a large area is unstained", "no": "little area is unstained"},
    }
    opening = {
        "dab_area": "the brown area is",
        "dab_where": "brown is strongest in the",
        "nuclei": "the density of nuclei is",
        "stain": "the larger stain is",
    }
    return tuple(
        wording[kind][answer] if kind in wording else f"{opening[kind]} {answer}" for kind, answer in found.items()
    )


def generate(count: int, split: str, rng: Random) -> list[Sample]:
    """Cut `count` patches from random places of the split's region, each rotated and mirrored at random."""
    region = REGIONS[split]
    picture = photograph()[region.top : region.bottom, region.left : region.right]
    samples = []
    for index in range(count):
        top = rng.randint(0, picture.shape[0] - IMAGE_SIZE)
        left = rng.randint(0, picture.shape[1] - IMAGE_SIZE)
        patch = picture[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        patch = np.rot90(patch, rng.randrange(4))
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
        patch = np.ascontiguousarray(patch)
        found = findings(measure(patch))
        asked = tuple(Question(QUESTIONS[kind][0], answer, QUESTIONS[kind][1]) for kind, answer in found.items())
        # The name holds the place of the patch: it shows that the splits do not overlap.
        name = f"{index:05d}_y{region.top + top}_x{region.left + left}"
        samples.append(Sample(name, Image.fromarray(patch), caption(found, rng), facts(found), asked))
    return samples
