"""The ground floor: errors, logging, ranks, files, text and figures; it knows nothing of models."""
