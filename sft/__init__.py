"""Demonstrations in, warm-started weights out."""
