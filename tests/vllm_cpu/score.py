"""Writes vLLM's log-probabilities of the tokens of a prompt: score.py CHECKPOINT TOKENS-AS-JSON OUT-FILE."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from evalsuite.engines.vllm_plugin import cpu_int4


def main(folder: str, tokens: list[int], out: Path) -> None:
    cpu_int4.install()
    llm = LLM(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64, enforce_eager=True
    )  # fmt: skip
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    logprobs = [entry[t].logprob for t, entry in zip(tokens[1:], answer.prompt_logprobs[1:], strict=True)]
    out.write_text(json.dumps(logprobs))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
