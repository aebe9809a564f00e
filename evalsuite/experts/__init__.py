"""The expert cache: which experts of a layer are on the device, and what it costs when one is not."""
