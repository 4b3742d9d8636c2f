"""LLaVA-1.5 training with a sparse mixture of LoRA experts (MoLE)."""

__version__ = "0.1.0"
