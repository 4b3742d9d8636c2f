"""Constants of the data and the model; those that LLaVA defines keep its names and values."""

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id of one image feature; the model replaces it. It is never the id of a token in the vocabulary."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""The marker of an image in the text of a conversation."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
