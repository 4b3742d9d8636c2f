"""LLaVA's, Hugging Face's, open_clip's and the MoLE authors' files: what they are, and their way in and out."""
