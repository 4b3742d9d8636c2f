"""LLaVA-1.5 training with a sparse mixture of LoRA experts (MoLE)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor

__all__ = ["Predictor", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Predictor` when it is asked for: PyTorch takes seconds, and commands import this package too."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava_mole.inference.predictor import Predictor

    return Predictor
