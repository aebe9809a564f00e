"""Sizes of a hybrid mixture-of-experts model, from the numbers of its configuration alone.

Weights: INT4 stores n weights of a group of g as 4·n bits and one 16-bit scale, 4 + 16/g bits a weight; BF16
stores 16 bits. Quantized are the experts, the shared expert and the large projections of both attentions;
router, gates, norms, convolutions, embeddings and head stay in BF16. Bytes are bytes: GB is 10⁹.

Shapes: https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen3_5_moe
"""

from typing import Literal

from pydantic import Field, PositiveInt

from evalsuite.core.value import Value

Stored = Literal["INT4", "BF16"]
BF16_BYTES = 2.0


class Geometry(Value):
    """A text model, spelled as its config.json spells it.

    Attributes:
        source: where the numbers are published.
        full_attention_interval: one layer in so many has full attention, the others linear.
        group_size: weights that share a scale where they are quantized.
    """

    source: str
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    vocab_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    linear_num_key_heads: PositiveInt
    linear_num_value_heads: PositiveInt
    linear_key_head_dim: PositiveInt
    linear_value_head_dim: PositiveInt
    linear_conv_kernel_dim: PositiveInt
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    shared_expert_intermediate_size: PositiveInt
    full_attention_interval: PositiveInt = 4
    tie_word_embeddings: bool = False
    group_size: PositiveInt = Field(default=128)

    def with_layers(self, layers: int) -> "Geometry":
        return self.model_copy(update={"num_hidden_layers": layers})

    @property
    def _full_layers(self) -> int:
        return self.num_hidden_layers // self.full_attention_interval

    @property
    def _linear_layers(self) -> int:
        return self.num_hidden_layers - self._full_layers

    @property
    def _linear_widths(self) -> tuple[int, int]:
        """Columns of keys and of values in a layer of linear attention."""
        return (
            self.linear_num_key_heads * self.linear_key_head_dim,
            self.linear_num_value_heads * self.linear_value_head_dim,
        )

    @property
    def expert_weights(self) -> int:
        """Gate, up and down projection of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def routed_weights(self) -> int:
        return self.num_hidden_layers * self.num_experts * self.expert_weights

    @property
    def linear_weights(self) -> int:
        """Quantizable weights outside the routed experts: both attentions and the shared experts."""
        keys, values = self._linear_widths
        heads = self.num_attention_heads * self.head_dim
        # the query projection also gives the output gate
        full = self.hidden_size * (2 * heads + 2 * self.num_key_value_heads * self.head_dim + heads)
        linear = self.hidden_size * (2 * keys + values + values + values)
        shared = 3 * self.hidden_size * self.shared_expert_intermediate_size
        return self._full_layers * full + self._linear_layers * linear + self.num_hidden_layers * shared

    @property
    def embedding_weights(self) -> int:
        """Embeddings, and the head where it has weights of its own."""
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    @property
    def small_weights(self) -> int:
        """Router, gate of the shared expert, norms, convolutions and decay parameters."""
        keys, values = self._linear_widths
        heads = self.linear_num_value_heads
        every = self.hidden_size * (self.num_experts + 1 + 2)
        linear = (
            2 * self.hidden_size * heads
            + (2 * keys + values) * self.linear_conv_kernel_dim
            + 2 * heads
            + self.linear_value_head_dim
        )
        full = 2 * self.head_dim
        return (
            self.num_hidden_layers * every
            + self._linear_layers * linear
            + self._full_layers * full
            + self.hidden_size
        )

    @property
    def parameters(self) -> int:
        return self.routed_weights + self.linear_weights + self.embedding_weights + self.small_weights

    @property
    def active_parameters(self) -> int:
        """Weights that a decoded token meets: without the experts not chosen, and without the embeddings."""
        chosen = self.num_hidden_layers * self.num_experts_per_tok * self.expert_weights
        head = self.vocab_size * self.hidden_size
        return chosen + self.linear_weights + self.small_weights + head

    def _weight_bytes(self, stored: Stored) -> float:
        return 0.5 + BF16_BYTES / self.group_size if stored == "INT4" else BF16_BYTES

    def expert_bytes(self, stored: Stored) -> float:
        return self.expert_weights * self._weight_bytes(stored)

    def routed_bytes(self, stored: Stored) -> float:
        return self.routed_weights * self._weight_bytes(stored)

    def buffer_bytes(self, stored: Stored, slots: int) -> float:
        """Experts on the device with `slots` of them in every layer, at most all."""
        return self.num_hidden_layers * min(slots, self.num_experts) * self.expert_bytes(stored)

    def other_bytes(self, stored: Stored) -> float:
        """Everything but the routed experts."""
        kept = (self.embedding_weights + self.small_weights) * BF16_BYTES
        return self.linear_weights * self._weight_bytes(stored) + kept

    def checkpoint_bytes(self, stored: Stored) -> float:
        """The text model's weights; a vision tower or a draft head comes on top."""
        return self.routed_bytes(stored) + self.other_bytes(stored)

    def token_bytes(self, stored: Stored) -> float:
        """Weights read for one decoded token at batch 1."""
        head = self.vocab_size * self.hidden_size
        kept = (self.small_weights + head) * BF16_BYTES
        return self.miss_bytes(stored, 0.0) + self.linear_weights * self._weight_bytes(stored) + kept

    def miss_bytes(self, stored: Stored, hit_rate: float) -> float:
        """Experts copied to the device for one decoded token at batch 1."""
        chosen = self.num_hidden_layers * self.num_experts_per_tok
        return (1 - hit_rate) * chosen * self.expert_bytes(stored)
