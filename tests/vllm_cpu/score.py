"""Writes vLLM's log-probabilities of the tokens of a prompt: score.py CHECKPOINT TOKENS-AS-JSON OUT-FILE."""

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16


class ReferenceExperts(CPUUnquantizedExperts):
    """INT4 experts in plain torch, on the weights that vLLM has unpacked and dequantised from the checkpoint.

    vLLM has INT4 experts only for GPUs and for CPUs with AMX. Its loading, routing and unpacking stay in use.
    """

    def __init__(self, moe_config, quant_config):
        super().__init__(moe_config, quant_config)
        for weight in (quant_config._w1, quant_config._w2):
            weight.dtype = weight.scale = None

    _supports_quant_scheme = staticmethod(Int4EmulationTritonExperts._supports_quant_scheme)

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_, **__):
        total = torch.zeros(output.shape)
        for expert in range(len(w1)):
            rows, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden_states[rows] @ w1[expert].T).chunk(2, dim=-1)
            result = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
            total.index_add_(0, rows, result.float() * topk_weights[rows, place, None].float())
        output.copy_(total)


def main(folder: str, tokens: list[int], out: Path) -> None:
    backends = int_wna16._get_priority_backends()
    int_wna16._get_priority_backends = lambda: [*backends, int_wna16.WNA16MoEBackend.EMULATION]
    int4_emulation_moe.Int4EmulationTritonExperts = ReferenceExperts
    llm = LLM(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, enforce_eager=True
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    logprobs = [entry[t].logprob for t, entry in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)]
    out.write_text(json.dumps(logprobs))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
