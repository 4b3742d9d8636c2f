"""`llava-mole check-data`: read every record and image of a run before it starts."""
