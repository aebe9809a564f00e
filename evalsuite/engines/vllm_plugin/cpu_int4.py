"""INT4 experts on a CPU: vLLM has them only for GPUs and for CPUs with AMX.

vLLM's loading, routing and unpacking stay in use; the dequantised experts run in plain torch. A reference for
tests, slow, and only for CPU builds of vLLM.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16


class ReferenceExperts(CPUUnquantizedExperts):
    """Experts on the weights that vLLM has unpacked and dequantised; sums in float32."""

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        for weight in (quant_config._w1, quant_config._w2):
            weight.dtype = weight.scale = None

    _supports_quant_scheme = staticmethod(Int4EmulationTritonExperts._supports_quant_scheme)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        total = torch.zeros(output.shape)
        for expert in topk_ids.unique().tolist():
            rows, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden_states[rows] @ w1[expert].T).chunk(2, dim=-1)
            result = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
            total.index_add_(0, rows, result.float() * topk_weights[rows, place, None].float())
        output.copy_(total)


def install() -> None:
    """Let vLLM take these for INT4 experts, also where it has kernels of its own (AMX); once."""
    if int4_emulation_moe.Int4EmulationTritonExperts is ReferenceExperts:
        return
    backends = int_wna16._get_priority_backends()
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.EMULATION, *backends]
    int4_emulation_moe.Int4EmulationTritonExperts = ReferenceExperts
