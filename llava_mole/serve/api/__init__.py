"""An OpenAI-compatible server: `llava-mole serve`."""
