"""How many bytes a model is, and how many of them a decoded token needs.

A decoding step gives one token to each of b sequences. It reads

    dense weights                       once: attention, norms, routers, shared experts, the output head
    embeddings                          one row a sequence
    experts, in each expert layer       as many distinct ones as the b·k choices hit
    keys and values                     of each sequence's context, in the full-attention layers
    recurrent states                    of each sequence, in the linear-attention layers; read and written

Under uniform routing, b tokens that choose k of E experts hit E·(1 − (1 − k/E)^b) distinct ones on average;
for b = 1 that is k. A real router is not uniform: it hits fewer.
"""

from evalsuite.core.value import Value


class Geometry(Value):
    """Sizes that follow from a configuration, in bytes as the weights are held in memory.

    Attributes:
        total_bytes: all weights of the text model.
        dense_bytes: those read in every step.
        row_bytes: one row of the embedding.
        expert_bytes: one expert of one layer, its scales included; 0 without experts.
        expert_layers, experts, top_k: layers that have experts, experts in each, and how many a token takes.
        kv_bytes_per_token: keys and values of one position, over all layers that keep them.
        state_bytes: recurrent states of one sequence.
        token_weights: numbers that one token is multiplied with; two operations each.
        context: longest context of the configuration.
    """

    total_bytes: int
    dense_bytes: int
    row_bytes: int
    expert_bytes: int
    expert_layers: int
    experts: int
    top_k: int
    kv_bytes_per_token: int
    state_bytes: int
    token_weights: int
    context: int | None

    def distinct_experts(self, sequences: int) -> float:
        """Experts of a layer that one step of `sequences` tokens needs, on average under uniform routing."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.top_k / self.experts) ** sequences)

    def step_bytes(self, sequences: int, context: float) -> int:
        """Bytes that one decoding step reads, and of recurrent states also writes.

        Args:
            context: tokens before the decoded one, mean over the step's sequences.
        """
        experts = self.distinct_experts(sequences) * self.expert_layers * self.expert_bytes
        each = self.row_bytes + context * self.kv_bytes_per_token + 2 * self.state_bytes
        return round(self.dense_bytes + experts + sequences * each)

    def device_bytes(self, cache_size: int | None) -> int:
        """Weights that lie on the device with this many expert slots a layer; None for all experts."""
        if cache_size is None:
            return self.total_bytes
        absent = max(0, self.experts - cache_size)
        return self.total_bytes - absent * self.expert_layers * self.expert_bytes

    def request_bytes(self, sequences: int, tokens: int) -> int:
        """Keys, values and states of `sequences` requests of `tokens` tokens, at their ends."""
        return sequences * (tokens * self.kv_bytes_per_token + self.state_bytes)
