"""`llava-mole prepare`: convert published data sets and your own data into prepared sets."""
