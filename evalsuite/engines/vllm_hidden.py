"""What of the vLLM scorer runs inside vLLM's workers: it keeps final hidden states and applies the head.

vLLM's own ``prompt_logprobs`` makes the full float32 logits of every position of every prompt and a Python
dictionary of each. Here the model runner's step is watched instead: after each one the hidden states of the
scored positions are cut out and reduced to a log-sum-exp and one logit in chunks (engines/head.py).

The watch sits behind the model's forward pass, so that compilation and CUDA graphs do not matter, and reads
what both of vLLM's model runners have: the scheduler's output (which request, how many tokens, from which
position: chunked prefill, several requests a step and recomputation after a preemption are told by these
alone), the order of the requests in the batch, and the hidden states. vLLM's own extraction of hidden states
(a speculative method) writes all positions of all prompts to files, and its pooling runner drops the head;
neither knows every architecture.

Under tensor parallelism the hidden states are whole on every rank and the head is shared out by vocabulary:
each rank answers for its rows, and whoever asks adds up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalsuite.core.errors import MeasurementError
from evalsuite.engines.head import Head, log_sum_and_logit

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
REQUEST = "hlwq_scoring"  # key under which a request's extra_args carry its scored positions


@dataclass(frozen=True)
class RankScore:
    """One request on one rank.

    Attributes:
        log_sum, logit: float32 [scored], over the rank's rows of the head; the logit is −∞ where the target
            is in another's.
        hidden: bfloat16 bits, uint16 [scored, hidden], on the first rank where they are kept, else None.
        seen: bool [scored], which positions a forward pass has reached.
    """

    log_sum: NDArray[np.float32]
    logit: NDArray[np.float32]
    hidden: NDArray[np.uint16] | None
    seen: NDArray[np.bool_]


@dataclass
class _Request:
    """Positions `first` and following of a prompt predict `targets`; all but these are on the device."""

    first: int
    targets: torch.Tensor
    seen: NDArray[np.bool_]
    log_sum: torch.Tensor
    logit: torch.Tensor
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class _Cut:
    """Rows `start` to `stop` of a step's hidden states, which are `place` of a request's scored positions."""

    request: _Request
    start: int
    stop: int
    place: slice


@dataclass
class _Watch:
    """Takes the place of a model runner's ``execute_model``.

    Attributes:
        head, first: this rank's rows of the head, and the number of the first of them.
    """

    runner: Any
    head: Head
    first: int
    keep_hidden: bool
    execute: Any
    requests: dict[str, _Request] = field(default_factory=dict[str, _Request])
    numbers: dict[int, str] = field(default_factory=dict[int, str])

    @torch.inference_mode()
    def step(self, scheduled: Any, *args: Any, **options: Any) -> Any:
        answer = self.execute(scheduled, *args, **options)
        state = self.runner.execute_model_state
        if state is not None:
            self._enter(scheduled)
            cuts = list(self._cuts(scheduled, _order(self.runner, state)))
            if cuts:
                self._score(state.hidden_states, cuts)
        return answer

    def _enter(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            asked = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(REQUEST)
            if asked is not None:
                targets = torch.tensor(asked["targets"])
                count, like = len(targets), self.head.weight
                self.numbers[asked["number"]] = new.req_id
                self.requests[new.req_id] = _Request(
                    first=asked["first"],
                    targets=targets,
                    seen=np.zeros(count, bool),
                    log_sum=torch.empty(count, device=like.device),
                    logit=torch.empty(count, device=like.device),
                    hidden=like.new_empty((count, like.shape[1]), dtype=torch.bfloat16)
                    if self.keep_hidden
                    else None,
                )

    def _cuts(self, scheduled: Any, order: list[str]) -> Iterator[_Cut]:
        cached = scheduled.scheduled_cached_reqs
        begins = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        begins |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        row = 0
        for name in order:
            count, request = scheduled.num_scheduled_tokens[name], self.requests.get(name)
            if request is not None:
                begin = max(begins[name], request.first)
                end = min(begins[name] + count, request.first + len(request.targets))
                if begin < end:
                    shift = row - begins[name]
                    place = slice(begin - request.first, end - request.first)
                    yield _Cut(request, begin + shift, end + shift, place)
            row += count

    def _score(self, states: torch.Tensor, cuts: list[_Cut]) -> None:
        hidden = torch.cat([states[cut.start : cut.stop] for cut in cuts])
        targets = torch.cat([cut.request.targets[cut.place] for cut in cuts])
        if hidden.is_cuda:  # a copy from memory that is not pinned would wait for the forward pass
            targets = targets.pin_memory().to(hidden.device, non_blocking=True)
        log_sum, logit = log_sum_and_logit(hidden, targets, self.head, self.first)
        row = 0
        for cut in cuts:
            rows = slice(row, row := row + cut.stop - cut.start)
            cut.request.log_sum[cut.place] = log_sum[rows]
            cut.request.logit[cut.place] = logit[rows]
            if cut.request.hidden is not None:
                cut.request.hidden[cut.place] = hidden[rows]
            cut.request.seen[cut.place] = True

    def take(self, first_rank: bool) -> dict[int, RankScore]:
        scores: dict[int, RankScore] = {}
        for number, name in self.numbers.items():
            request = self.requests[name]
            hidden = None
            if request.hidden is not None and first_rank:
                hidden = request.hidden.cpu().view(torch.uint16).numpy()
            scores[number] = RankScore(
                request.log_sum.cpu().numpy(), request.logit.cpu().numpy(), hidden, request.seen
            )
        self.forget()
        return scores

    def forget(self) -> None:
        self.requests.clear()
        self.numbers.clear()


def _order(runner: Any, state: Any) -> list[str]:
    """Request ids in the order of their rows: vLLM's newer model runner keeps them with the step's state."""
    batch = state.input_batch if hasattr(state, "input_batch") else runner.input_batch
    return list(batch.req_ids)


class HiddenScoring:
    """What the scorer asks of vLLM's workers; `rank` and `model_runner` are the worker's own."""

    rank: int
    model_runner: Any

    def hlwq_watch(self, keep_hidden: bool) -> None:
        """Watch every step from now on.

        Raises:
            MeasurementError: the architecture's head is not a plain projection.
        """
        runner = self.model_runner
        head, first = _find_head(runner.get_model(), self._hlwq_states(1))
        self._hlwq = _Watch(runner, head, first, keep_hidden, runner.execute_model)
        runner.execute_model = self._hlwq.step

    def hlwq_take(self) -> dict[int, RankScore]:
        """What was scored since the last call, by the number that each request was given."""
        return self._hlwq.take(self.rank == 0)

    def hlwq_forget(self) -> None:
        """Drop unfinished requests, and the state of a step that an error cut short."""
        self._hlwq.forget()
        self.model_runner.execute_model_state = None

    @torch.inference_mode()
    def hlwq_head_gap(self) -> tuple[float, float]:
        """Largest difference of this rank's logits from vLLM's at random states, and the largest of them."""
        states, head = self._hlwq_states(16), self._hlwq.head
        torch.manual_seed(0)
        states.normal_()
        own = self.model_runner.get_model().compute_logits(states)
        if own is None:  # only the first rank gathers them
            return 0.0, 0.0
        own = own[:, self._hlwq.first : self._hlwq.first + head.vocabulary].float()
        ours = torch.cat([head.logits(states, *chunk) for chunk in head.chunks(len(states))], dim=1)
        usable = own.isfinite()  # NaN weights are no fault of the head: scoring names the token
        if not usable.any():
            return 0.0, 0.0
        own, ours = own[usable], ours[usable]
        return float((own - ours).abs().max()), float(own.abs().max())

    def hlwq_save_head(self, path: str) -> str:
        """Write this rank's rows beside `path`; returns where."""
        part = f"{path}.{self.rank}"
        self._hlwq.head.save(Path(part))
        return part

    def hlwq_scoring_facts(self) -> dict[str, str]:
        return {
            "model_runner": type(self.model_runner).__module__.removeprefix("vllm."),
            "device": str(self._hlwq.head.weight.device),
        }

    def _hlwq_states(self, count: int) -> torch.Tensor:
        config = self.model_runner.model_config
        size = config.get_hidden_size()
        return torch.zeros((count, size), dtype=config.dtype, device=self.model_runner.device)


@torch.inference_mode()
def _find_head(model: Any, state: torch.Tensor) -> tuple[Head, int]:
    """The head that the model uses, caught while it does: architectures keep it in different places."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    caught: list[tuple[Any, ...]] = []

    def catch(processor: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        bias = args[2] if len(args) > 2 else options.get("embedding_bias")
        caught.append((processor, args[0] if args else options["lm_head"], bias))

    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    hooks = [processor.register_forward_pre_hook(catch, with_kwargs=True) for processor in processors]
    try:
        model.compute_logits(state)
    finally:
        for hook in hooks:
            hook.remove()
    weight = getattr(caught[0][1], "weight", None) if len(caught) == 1 else None
    if weight is None or weight.dtype not in PLAIN or caught[0][0].scale != 1:
        raise MeasurementError(
            f"The head of {type(model).__name__} is not a plain projection in vLLM.",
            cause="its weights are quantized, its logits are scaled, or it has several parts.",
            todo="use --engine torch.",
        )
    processor, layer, bias = caught[0]
    rows = layer.shard_indices.num_org_elements  # what follows is padding
    head = Head(weight[:rows], None if bias is None else bias[:rows], processor.soft_cap)
    return head, layer.shard_indices.org_vocab_start_index
