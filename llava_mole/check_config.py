"""Section `check` of a run's configuration: what `llava-mole check-data` lets pass."""

import dataclasses
from dataclasses import dataclass, field

from llava_mole.errors import ConfigError


@dataclass(kw_only=True)
class CheckConfig:
    """What `llava-mole check-data` lets pass. Shares are of a source's records, or of its image files."""

    evaluation_images: list[str] = field(default_factory=list)
    """Folders of images and question files (`.jsonl`) whose images must not be trained on."""
    max_bad_records: float = 0.0
    """Records that training refuses: unknown roles, markers that do not fit, no answer, nothing left to supervise, too
    long where data.max_length_policy is `error`."""
    max_missing_images: float = 0.0
    """Images that are not there or lead out of the image folder; training does not start with one."""
    max_bad_images: float = 0.001
    """Images that do not decode; training replaces such samples, see data.max_bad_image_share."""
    max_truncated: float = 0.2
    """Records that are longer than data.max_length and cut, shortened or dropped, see data.max_length_policy."""
    max_duplicates: float = 0.5
    """Records that are there again, word for word; up-sampling makes them."""
    max_overlap: float = 0.0
    """Share of the evaluation images that are trained on, by content."""
    huge_pixels: int = 50_000_000
    """Images of more pixels are listed; they take memory and seconds in a data loader."""


def check_limits(config: CheckConfig) -> None:
    """Raise ConfigError for a limit that is no share."""
    for key, value in dataclasses.asdict(config).items():
        if key.startswith("max_") and not 0 <= value <= 1:
            raise ConfigError(f"check.{key} is {value}; it is a share, 0 to 1")
