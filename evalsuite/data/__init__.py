"""Texts, windows over them, and where models and tokenizers lie on disk."""
