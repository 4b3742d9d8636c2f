"""Evaluation: answer question files with a model, score the answers, report the scores."""
