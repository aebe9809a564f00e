"""An expert cache for stock vLLM, loaded by vLLM itself through the entry point ``vllm.general_plugins``."""

# whether a cache size given to vLLM is honoured
PROVIDES_CACHE: bool = False


def register() -> None:
    """Called by vLLM in each of its processes; may be called more than once."""
