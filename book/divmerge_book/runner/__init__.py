"""Runs notebooks: one with checked parameters, a grid of runs, or all of them as a book."""
