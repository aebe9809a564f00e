"""Benchmarks and evaluates quantized language models, and keeps the evidence."""

__version__ = "0.1.0"
