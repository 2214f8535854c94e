"""Judgement: truth, yardstick, budget."""
