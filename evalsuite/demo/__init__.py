"""The built-in model: weights and tokenizer, made by `experiments/demo_model`."""
