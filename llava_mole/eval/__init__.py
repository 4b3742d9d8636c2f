"""Evaluation: answering benchmark questions and scoring the answers."""
