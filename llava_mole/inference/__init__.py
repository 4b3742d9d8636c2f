"""From prompt to answer, for training, evaluation and serving."""
