"""Evaluation: logits of a split, and metrics that are pure functions of them."""
