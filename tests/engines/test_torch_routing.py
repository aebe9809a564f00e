"""The recorded choices are those that the router's own logits lead to."""

import numpy as np
import pytest
import torch

from engines import tiny
from evalsuite.core.errors import MeasurementError, ModelError
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.torch_routing import TorchRouting

INPUT, OUTPUT = 9, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tiny.qwen3_5_moe(), tmp_path_factory.mktemp("routing") / "moe")


def recorder(folder):
    return TorchRouting(find_checkpoint(str(folder)), device="cpu", dtype="float32", trust_remote_code=False)


def prompts(count, length=INPUT):
    return list(np.random.default_rng(7).integers(0, 256, (count, length)))


def full_forward_choices(folder, ids):
    """Experts of each token from one pass without cache over the whole sequence: sets [layers][tokens]."""
    model = tiny.qwen3_5_moe().from_pretrained(folder, dtype=torch.float32).eval()
    logits = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(
            lambda gate, args: logits.append(torch.nn.functional.linear(args[0].reshape(-1, 32), gate.weight))
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        greedy = model(torch.from_numpy(ids)[None]).logits[0].argmax(-1)
    for hook in hooks:
        hook.remove()
    return [[set(row.topk(2).indices.tolist()) for row in layer] for layer in logits], greedy.numpy()


def test_choices_are_those_of_one_pass_over_the_whole_sequence(folder):
    """Greedy decoding is redone by hand: each next token comes from the full pass before."""
    recording = recorder(folder)
    passes = recording.record(prompts(1), OUTPUT, first=3)
    recording.close()
    ids = prompts(1)[0]
    for _ in range(OUTPUT - 1):
        ids = np.append(ids, full_forward_choices(folder, ids)[1][-1])
    expected, _ = full_forward_choices(folder, ids)
    found = np.concatenate([one.chosen for one in passes])
    assert found.shape == (INPUT + OUTPUT - 1, 2, 2)
    for layer in range(2):
        assert [set(row) for row in found[:, layer].tolist()] == expected[layer]
    assert [one.prefill for one in passes] == [True] + [False] * (OUTPUT - 1)
    assert np.concatenate([one.position for one in passes]).tolist() == list(range(INPUT + OUTPUT - 1))
    assert {int(r) for one in passes for r in one.request} == {3}


def test_requests_at_once_are_what_they_are_alone(folder):
    recording = recorder(folder)
    alone = [recording.record([prompt], OUTPUT, first=i) for i, prompt in enumerate(prompts(3))]
    together = recording.record(prompts(3), OUTPUT, first=0)
    recording.close()
    assert len(together) == OUTPUT
    for step, one in enumerate(together):
        for request in range(3):
            mine = one.request == request
            single = alone[request][step]
            assert one.position[mine].tolist() == single.position.tolist()
            np.testing.assert_array_equal(np.sort(one.chosen[mine]), np.sort(single.chosen))


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no layer with experts"):
        recorder(tiny.write(tiny.llama(), tmp_path / "dense"))


def test_experts_that_run_twice_are_not_taken_for_a_pass(folder):
    recording = recorder(folder)

    def again(module, args, out):
        rows = args[0].reshape(-1, 32)
        module.experts(rows, torch.zeros(len(rows), 2, dtype=torch.int64), torch.zeros(len(rows), 2))

    recording._model.model.layers[1].mlp.register_forward_hook(again)
    with pytest.raises(MeasurementError, match="Layer 1 ran its experts 2 times"):
        recording.record(prompts(1), 2, first=0)
