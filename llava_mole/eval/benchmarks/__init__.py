"""Benchmarks: their YAML schema, their questions and their submission files."""
