"""`llava-mole check-data`: check every record and image of a run before it starts."""
