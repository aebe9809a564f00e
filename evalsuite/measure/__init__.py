"""Quantities and their definitions: what is summed, what is divided, and by what."""
