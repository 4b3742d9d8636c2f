"""Checkpoints of LLaVA, Hugging Face, open_clip and the MoLE authors: recognised, imported and exported."""
