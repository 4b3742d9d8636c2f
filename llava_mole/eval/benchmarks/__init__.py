"""Benchmarks: their definition, their questions, and files for the servers that score some of them."""
