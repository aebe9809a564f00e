"""An expert cache for stock vLLM, loaded by vLLM itself through the entry point ``vllm.general_plugins``.

    vllm serve MODEL --moe-expert-cache-size 64
    LLM(MODEL, additional_config={"moe_expert_cache_size": 64})

The way of a setting: `arguments` adds the flags and writes them into ``additional_config``, which vLLM sends
to its workers; where it is set, `refusals` refuses what the cache cannot be combined with, and the engine
gets a worker of ours (`gpu_worker`, `cpu_worker`), whose import puts `layers.CachedExperts` over vLLM's MoE
methods.
Without the setting nothing of vLLM is changed but three functions that look for it, and its list of models,
where that lacks Qwen3.5 without a vision part (`text_only`).
"""


def register() -> None:
    """Called by vLLM in each of its processes; may be called more than once."""
    from evalsuite.engines.vllm_plugin.arguments import extend_arguments
    from evalsuite.engines.vllm_plugin.text_only import serve_text_only

    extend_arguments()
    serve_text_only()
