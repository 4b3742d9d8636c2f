"""`llava-mole compose`: one LoRA from several, with coefficients searched on a few examples (LoraHub)."""
