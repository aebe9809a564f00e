"""An expert cache for stock vLLM, loaded by vLLM itself through the entry point ``vllm.general_plugins``."""


def register() -> None:
    """Called by vLLM in each of its processes; may be called more than once."""
