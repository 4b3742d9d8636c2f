"""Constants shared by every layer; names and values are LLaVA's where LLaVA has one."""

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder id of one image feature row. Never a vocabulary id: the model scatters features over it."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""What stands for an image in a conversation's text."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
