"""One module for each kind of raw data that `llava-mole prepare` reads."""
