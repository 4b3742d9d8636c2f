"""Training data: records, conversations to tokens, images, mixtures, batches."""
