"""Scores of answers: metrics applied to questions, aggregated, with intervals."""
