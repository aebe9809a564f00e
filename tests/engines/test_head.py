"""Chunked log-probabilities and divergences against full logits in float64."""

import itertools
import math
import weakref

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evalsuite.engines import head as head_module
from evalsuite.engines.head import Head, divergence_of, log_sum_and_logit, nats_of

POSITIONS, WIDTH, VOCABULARY = 37, 16, 1000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.fixture(params=[(4096, 4096), (4096, 8), (40_000, 5), (64 << 20, 4096)], ids=str)
def _chunks(request, monkeypatch):
    """Bytes of logits and positions at a time; 256 columns are the least."""
    monkeypatch.setattr(head_module, "CHUNK_BYTES", request.param[0])
    monkeypatch.setattr(head_module, "CHUNK_POSITIONS", request.param[1])


def make_head(bias=False, softcap=None, scale=1.0, dtype=torch.float32):
    weight = (scale * torch.randn(VOCABULARY, WIDTH)).to(dtype)
    return Head(weight, torch.randn(VOCABULARY).to(dtype) if bias else None, softcap)


def logits_of(hidden, head):
    return oracles.full_logits(hidden, head.weight, head.bias, head.softcap)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_are_those_of_full_logits(bias, softcap, dtype):
    head = make_head(bias, softcap, dtype=dtype)
    hidden = torch.randn(POSITIONS, WIDTH).to(dtype)
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    targets[:3] = torch.tensor([0, VOCABULARY - 1, 256])
    expected = oracles.nats(logits_of(hidden, head), targets)
    torch.testing.assert_close(nats_of(hidden, targets, head).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("bounds", [(0, 1000), (0, 500, 1000), (0, 1, 256, 999, 1000)])
def test_shards_of_a_head_add_up(bounds):
    head = make_head(bias=True, softcap=3.0)
    hidden, targets = torch.randn(POSITIONS, WIDTH), torch.randint(VOCABULARY, (POSITIONS,))
    shards = [
        log_sum_and_logit(hidden, targets, Head(head.weight[a:b], head.bias[a:b], head.softcap), a)
        for a, b in itertools.pairwise(bounds)
    ]
    log_sum = torch.stack([shard[0] for shard in shards]).logsumexp(0)
    logits = torch.stack([shard[1] for shard in shards])
    assert (logits.isfinite().sum(0) == 1).all(), "each target lies in one shard"
    torch.testing.assert_close(log_sum - logits.amax(0), nats_of(hidden, targets, head))


@pytest.mark.usefixtures("_chunks")
def test_logits_far_from_zero_neither_overflow_nor_vanish():
    head = make_head(scale=100.0)
    hidden = 10 * torch.randn(POSITIONS, WIDTH)
    targets = torch.randint(VOCABULARY, (POSITIONS,))
    expected = oracles.nats(logits_of(hidden, head), targets)
    assert expected.max() > 5000
    torch.testing.assert_close(nats_of(hidden, targets, head).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_divergence_is_that_of_full_logits(bias, softcap):
    base_head, cand_head = make_head(bias, softcap), make_head(bias, softcap)
    cand_head.weight.copy_(base_head.weight + 0.1 * cand_head.weight)
    base = torch.randn(POSITIONS, WIDTH)
    cand = base + 0.1 * torch.randn(POSITIONS, WIDTH)
    p, q = logits_of(base, base_head), logits_of(cand, cand_head)
    kl, agree = divergence_of((base, base_head), (cand, cand_head))
    torch.testing.assert_close(kl.double(), oracles.kl(p, q), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(kl.double(), oracles.kl(q, p), rtol=1e-3, atol=1e-4), "KL has a direction"
    assert torch.equal(agree, p.argmax(-1) == q.argmax(-1))
    assert 0 < agree.sum() < POSITIONS


@pytest.mark.usefixtures("_chunks")
def test_a_model_does_not_diverge_from_itself():
    head, hidden = make_head(bias=True), torch.randn(POSITIONS, WIDTH)
    kl, agree = divergence_of((hidden, head), (hidden, head))
    assert kl.max() < 1e-6
    assert agree.all()


def test_equal_logits_agree_on_the_first_token_of_the_maximum():
    zeros = Head(torch.zeros(VOCABULARY, WIDTH))
    hidden = torch.randn(4, WIDTH)
    kl, agree = divergence_of((hidden, zeros), (hidden, zeros))
    assert agree.all()
    assert kl.abs().max() == 0
    assert nats_of(hidden, torch.arange(4), zeros).tolist() == pytest.approx(
        [math.log(VOCABULARY)] * 4, rel=1e-6
    )


@pytest.mark.parametrize("place", ["hidden", "weight", "other weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(place, bad, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4096)
    head, hidden = make_head(), torch.randn(POSITIONS, WIDTH)
    hidden[5, 0] = 1  # times infinity; a logit of −∞ is a probability of zero, and no fault
    if place == "hidden":
        hidden[5, 0] = bad
    else:
        head.weight[7 if place == "weight" else 900, 0] = bad
    nats = nats_of(hidden, torch.full((POSITIONS,), 7), head)
    assert not nats[5].isfinite()
    if place == "hidden":
        assert nats[:5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 0.1 + 0.2)])
def test_a_saved_head_comes_back_whole(tmp_path, dtype, bias, softcap):
    head = make_head(bias, softcap, dtype=dtype)
    head.save(tmp_path / "head.safetensors")
    back = Head.load(tmp_path / "head.safetensors", "cpu")
    assert torch.equal(back.weight, head.weight)
    assert back.weight.dtype == dtype
    assert back.softcap == softcap
    assert (back.bias is None) if head.bias is None else torch.equal(back.bias, head.bias)


class Allocations(TorchDispatchMode):
    """Bytes of storages made inside, the most alive at once and the largest. In-place results and views
    share a storage that is counted once."""

    def __init__(self, *known):
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.largest = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._seen or size == 0:
            return
        self._seen.add(address)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address, size):
        self._seen.discard(address)
        self.alive -= size


class TestMemoryAtALargeVocabulary:
    """248,320 tokens, 1,536 positions: full float32 logits would be 1.5 GB."""

    WIDE = 248_320

    @pytest.mark.parametrize(
        ("positions", "width", "dtype", "softcap"),
        [
            (1536, 16, torch.float32, None),
            (512, 16, torch.bfloat16, 30.0),
            (256, 512, torch.bfloat16, None),
            (1, 512, torch.bfloat16, None),
            (1, 512, torch.float32, 30.0),
        ],
    )
    def test_nats(self, positions, width, dtype, softcap):
        weight = torch.randn(1, width).to(dtype).expand(self.WIDE, width).clone()
        hidden = torch.randn(positions, width).to(dtype)
        targets = torch.randint(self.WIDE, (positions,))
        with Allocations(weight, hidden, targets) as made:
            nats_of(hidden, targets, Head(weight, softcap=softcap))
        assert made.largest <= head_module.CHUNK_BYTES
        assert 1e5 < made.peak < 300e6

    def test_divergence(self):
        weight = torch.randn(1, 64).bfloat16().expand(self.WIDE, 64).clone()
        hidden = torch.randn(512, 64).bfloat16()
        with Allocations(weight, hidden) as made:
            divergence_of((hidden, Head(weight)), (hidden, Head(weight)))
        assert made.largest <= head_module.CHUNK_BYTES
        assert 1e6 < made.peak < 300e6
