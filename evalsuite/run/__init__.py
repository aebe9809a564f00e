"""From a spec to a finished record: one file a kind, the only layer that knows every one below it."""
