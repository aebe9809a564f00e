"""The quantizer: BF16 checkpoints into INT4 that vLLM loads, into HLWQ codes, or back into plain BF16."""
