"""The published scoring rules, one per file: pure functions on texts. `table.py` gives each its name.

Where two evaluators disagree, there is a function for each, never a mean of both.
"""
