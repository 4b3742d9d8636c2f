"""The published scoring rules, one idea a file: pure functions on texts. `table.py` gives each its name.

Where two evaluators disagree there are two functions, or a `dialect`, and never a mean of both.
"""
