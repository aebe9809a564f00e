"""Experiment files: one question each, as an ablation of arms or as an evaluation in steps."""
