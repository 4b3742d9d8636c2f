"""`llava-mole study`: many runs as one experiment, from its grid of cells to the report."""
