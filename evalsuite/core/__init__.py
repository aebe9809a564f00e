"""Values and arithmetic that every layer shares: no input or output, no torch."""
