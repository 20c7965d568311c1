"""Recipes, the training loop, launching, and proving a run against one process."""
