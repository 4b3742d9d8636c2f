"""Scores: metrics applied to answers, aggregated to numbers with intervals."""
