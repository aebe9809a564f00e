"""Which weights of an architecture are quantized, and why the others are not.

One table per family, read from the top; the first rule that fits a tensor decides. A pattern is matched
against the whole name of a module (or of a parameter that belongs to none), with any prefix before it, so
that ``model.layers.0.mlp.gate`` and ``model.language_model.layers.0.mlp.gate`` are the same rule's. A tensor
that no rule knows is an error: guessing would either damage a model quietly or leave it large.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evalsuite.core.errors import ModelError


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        pattern: regular expression of a module's name.
        layer_class: what such tensors are called in reports.
        keep: why they stay as they are; empty for weights that are quantized.
    """

    pattern: str
    layer_class: str
    keep: str = ""

    def fits(self, module: str) -> bool:
        return re.fullmatch(rf"(.*\.)?{self.pattern}", module) is not None

    @property
    def ignore(self) -> str:
        """The same rule as an entry of compressed-tensors' ``ignore`` list."""
        return rf"re:(.*\.)?{self.pattern}$"


@dataclass(frozen=True)
class Family:
    """An architecture's rules.

    Attributes:
        name: as people write it.
        rules: in order of precedence.
        multimodal: vLLM runs it through Qwen3-VL's processor classes, which want files of their own.
    """

    name: str
    rules: tuple[Rule, ...]
    multimodal: bool = False

    def rule_for(self, tensor: str) -> Rule:
        """The rule that decides about a tensor.

        Raises:
            ModelError: no rule fits it.
        """
        stem, _, kind = tensor.rpartition(".")
        module = stem if kind in ("weight", "bias") else tensor
        for rule in self.rules:
            if rule.fits(module):
                return BIAS if kind == "bias" and not rule.keep else rule
        raise ModelError(
            f"The rules for {self.name} know no tensor {tensor}.",
            cause="the checkpoint differs from the architecture that its config.json names.",
            todo="check model_type in config.json, or add a rule to evalsuite/quant/rules.py.",
        )

    @property
    def ignore(self) -> list[str]:
        """Everything that the table keeps, for compressed-tensors' ``ignore`` list."""
        return [rule.ignore for rule in self.rules if rule.keep]


BIAS = Rule("", "bias", keep="added, not multiplied: a few numbers a row")

OUTSIDE = (
    Rule(r"visual\..*", "visual", keep="not part of a text model; its width of 4,304 suits no INT4 kernel"),
    Rule(r"mtp\..*", "multi-token head", keep="speculates only; the scored model does not contain it"),
    Rule(r"embed_tokens", "embedding", keep="looked up, not multiplied"),
    Rule(r"lm_head", "head", keep="its errors reach the logits directly"),
)
NORMS = (Rule(r"(norm|[qk]_norm|(input|post_attention)_layernorm)", "norm", keep="one number a channel"),)
ATTENTION = (Rule(r"self_attn\.[qkvo]_proj", "attention"),)
ROTARY = (Rule(r"rotary_emb\.inv_freq", "rotary", keep="a table of frequencies, not a weight"),)
LINEAR_ATTENTION = (
    Rule(r"linear_attn\.(in_proj_qkv|in_proj_z|out_proj)", "linear attention"),
    Rule(r"linear_attn\.in_proj_[ab]", "gates", keep="one output a head, and it gates the recurrent state"),
    Rule(r"linear_attn\.(A_log|dt_bias)", "recurrence", keep="one number a head; exponentiated every step"),
    Rule(r"linear_attn\.conv1d", "convolution", keep="four numbers a channel"),
)
DENSE = (Rule(r"mlp\.(gate|up|down)_proj", "mlp"),)
ROUTED = (
    Rule(r"mlp\.experts\.(\d+\.(gate|up|down)_proj|gate_up_proj|down_proj)", "experts"),
    Rule(r"mlp\.gate", "router", keep="a near tie that rounding turns picks another expert"),
)
SHARED = (
    Rule(r"mlp\.shared_expert\.(gate|up|down)_proj", "shared expert"),
    Rule(r"mlp\.shared_expert_gate", "router", keep="one output; it scales a whole expert"),
)

LLAMA = Family("Llama", OUTSIDE + NORMS + ATTENTION + DENSE + ROTARY)
QWEN3 = Family("Qwen3", OUTSIDE + NORMS + ATTENTION + DENSE)
QWEN3_MOE = Family("Qwen3-MoE", OUTSIDE + NORMS + ATTENTION + DENSE + ROUTED)
QWEN3_5_RULES = OUTSIDE + NORMS + ATTENTION + LINEAR_ATTENTION + DENSE
QWEN3_5_MOE_RULES = OUTSIDE + NORMS + ATTENTION + LINEAR_ATTENTION + ROUTED + SHARED

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_5_text": Family("Qwen3.5", QWEN3_5_RULES),
    "qwen3_5": Family("Qwen3.5", QWEN3_5_RULES, multimodal=True),
    "qwen3_5_moe_text": Family("Qwen3.5-MoE", QWEN3_5_MOE_RULES),
    "qwen3_5_moe": Family("Qwen3.5-MoE", QWEN3_5_MOE_RULES, multimodal=True),
}


def family(config: Mapping[str, Any]) -> Family:
    """The rules for a checkpoint's config.json.

    Raises:
        ModelError: the architecture has no rules.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ModelError(
        f"There are no quantization rules for the architecture {model_type!r}.",
        cause="which of its weights bear rounding has not been decided.",
        todo=f"supported are {', '.join(FAMILIES)}; a new one is a table in evalsuite/quant/rules.py.",
    )
