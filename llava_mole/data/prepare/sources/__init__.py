"""The sources of `llava-mole prepare`, one module for each kind of raw data."""
