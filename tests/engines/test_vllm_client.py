"""Time stamps and failures of the server engine, against a server that follows a script."""

import time
from contextlib import contextmanager

import numpy as np
import pytest

from engines.scripted_server import Script, serving
from evalsuite.core.errors import EngineDied, UsageError
from evalsuite.core.spec import Serving
from evalsuite.data.models import find_checkpoint
from evalsuite.engines.vllm_client import token_ids
from evalsuite.engines.vllm_server import ServerGenerator, server_flags

# one token after 0.1 s, three in one event 0.15 s later, two in two events of one piece 0.1 s after that
PIECES = [(0.1, [[11]]), (0.15, [[12, 13, 14]]), (0.1, [[15], [16]])]
SCRIPTED_S = [0.1, 0.25, 0.25, 0.25, 0.35, 0.35]
LATE_S = 0.09  # how late a stamp may be on a busy machine, less than any gap


@contextmanager
def generator(script, tmp_path, **settings):
    with serving(script) as url:
        loaded = ServerGenerator(
            find_checkpoint("demo"), Serving(server_url=url, **settings), tmp_path / "log"
        )
        try:
            yield loaded
        finally:
            loaded.close()


def prompts(count=1, length=5):
    return [np.arange(length) + i for i in range(count)]


def nothing():
    pass


class TestStamps:
    @pytest.mark.parametrize("names_ids", [False, True])
    def test_follow_the_script(self, tmp_path, names_ids):
        first = []
        with generator(Script(PIECES, names_ids=names_ids), tmp_path) as loaded:
            (result,) = loaded.generate(prompts(), 6, lambda: first.append(time.monotonic()))
        assert result.ids.tolist() == [11, 12, 13, 14, 15, 16]
        assert result.ids.dtype == np.int64
        after = result.token_s - result.submitted_s
        assert np.all(after >= np.array(SCRIPTED_S) - 0.001)
        assert np.all(after <= np.array(SCRIPTED_S) + LATE_S)
        assert result.token_s[1] == result.token_s[2] == result.token_s[3]
        assert result.token_s[4] == result.token_s[5]
        assert len(first) == 1
        assert result.token_s[0] <= first[0] < result.token_s[1]

    def test_of_requests_side_by_side(self, tmp_path):
        script, first = Script(PIECES), []
        with generator(script, tmp_path) as loaded:
            began = time.monotonic()
            results = loaded.generate(prompts(4), 6, lambda: first.append(time.monotonic()))
            took = time.monotonic() - began
        assert took < 2 * SCRIPTED_S[-1]  # one after the other would be four times
        assert len(first) == 1
        assert max(result.token_s[0] for result in results) <= first[0]
        assert sorted(body["prompt"] for body in script.requests) == [p.tolist() for p in prompts(4)]
        assert all(result.ids.tolist() == [11, 12, 13, 14, 15, 16] for result in results)

    def test_what_is_asked_for(self, tmp_path):
        script = Script(PIECES)
        with generator(script, tmp_path) as loaded:
            loaded.generate(prompts(), 6, nothing)
        (body,) = script.requests
        assert body == {
            "model": "demo", "prompt": [0, 1, 2, 3, 4], "max_tokens": 6, "ignore_eos": True,
            "temperature": 0, "stream": True, "return_token_ids": True,
        }  # fmt: skip

    def test_what_is_longer_than_the_server_takes_is_not_sent(self, tmp_path):
        script = Script(PIECES)
        with generator(script, tmp_path) as loaded, pytest.raises(UsageError, match="set up for 512"):
            loaded.generate(prompts(2, 507), 6, nothing)
        assert script.requests == []

    def test_too_few_tokens_are_no_result(self, tmp_path):
        with (
            generator(Script(PIECES), tmp_path) as loaded,
            pytest.raises(EngineDied, match="6 tokens instead of 7"),
        ):
            loaded.generate(prompts(), 7, nothing)


class TestFailures:
    def test_a_connection_that_drops(self, tmp_path):
        with (
            generator(Script(PIECES, dies_after=2), tmp_path) as loaded,
            pytest.raises(EngineDied, match="No answer") as caught,
        ):
            loaded.generate(prompts(2), 6, nothing)
        assert "--server-url" in caught.value.todo

    def test_a_stream_that_no_vllm_sends(self, tmp_path):
        with (
            generator(Script([(0.0, [[{"token": 7}]])]), tmp_path) as loaded,
            pytest.raises(EngineDied, match="streams what no vLLM server does"),
        ):
            loaded.generate(prompts(), 6, nothing)

    def test_a_request_that_is_refused(self, tmp_path):
        script = Script(status=400, message="max_tokens=6 cannot be greater than max_model_len=3")
        with generator(script, tmp_path) as loaded, pytest.raises(UsageError) as caught:
            loaded.generate(prompts(), 6, nothing)
        assert "max_model_len=3 (status 400)" in caught.value.cause

    @pytest.mark.parametrize(
        "script",
        [
            Script(status=500, message="EngineCore encountered an issue."),
            Script(PIECES[:1], error_event={"message": "EngineCore encountered an issue.", "code": 500}),
        ],
        ids=["at once", "within the stream"],
    )
    def test_a_server_that_fails(self, tmp_path, script):
        with generator(script, tmp_path) as loaded, pytest.raises(EngineDied, match="status 500") as caught:
            loaded.generate(prompts(), 6, nothing)
        assert "EngineCore encountered" in caught.value.cause

    def test_nothing_there(self, tmp_path):
        with serving(Script()) as url:
            pass
        with pytest.raises(EngineDied, match="No answer from the server") as caught:
            ServerGenerator(find_checkpoint("demo"), Serving(server_url=url), tmp_path / "log")
        assert "--server-url" in caught.value.todo

    def test_another_model(self, tmp_path):
        with (
            pytest.raises(UsageError, match="serves other/model, not demo"),
            generator(Script(model="other/model"), tmp_path),
        ):
            pass

    def test_no_vllm_at_all(self, tmp_path):
        with (
            pytest.raises(UsageError, match="does not tell the ids"),
            generator(Script(tells_ids=False), tmp_path),
        ):
            pass

    @pytest.mark.parametrize(
        "setting",
        [{"enforce_eager": True}, {"moe_expert_cache_size": 8}, {"dtype": "float16"}, {"max_model_len": 9},
         {"tensor_parallel_size": 2}, {"gpu_memory_utilization": 0.5}, {"additional_config": {"a": 1}}],
        ids=lambda setting: next(iter(setting)),
    )  # fmt: skip
    def test_settings_that_come_too_late(self, tmp_path, setting):
        with pytest.raises(UsageError, match=f"{next(iter(setting))} was given.*runs already"):
            ServerGenerator(
                find_checkpoint("demo"), Serving(server_url="http://127.0.0.1:9", **setting), tmp_path / "log"
            )


def test_of_a_running_server_what_it_does_not_tell_is_absent(tmp_path):
    with generator(Script(PIECES), tmp_path) as loaded:
        assert loaded.load.total_s is None
        memory = loaded.memory()
        assert memory.weights_bytes is None
        assert memory.kv_cache_bytes is None
        assert "does not tell" in memory.absent["engine"]
        assert loaded.expert_cache() is None
        assert loaded.facts.engaged == {
            "vllm": "0.32.0", "server": "attached", "mode": "unknown", "max_model_len": 512,
        }  # fmt: skip
        assert any("not known" in warning for warning in loaded.facts.warnings)
        with pytest.raises(UsageError):
            loaded.resize_expert_cache(4)


def test_an_url_may_end_like_the_api_does(tmp_path):
    with serving(Script(PIECES)) as url:
        loaded = ServerGenerator(find_checkpoint("demo"), Serving(server_url=f"{url}/v1/"), tmp_path / "log")
        (result,) = loaded.generate(prompts(), 6, nothing)
        loaded.close()
    assert len(result.ids) == 6


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ({"token_ids": [1, 2]}, [1, 2]),
        ({"token_ids": []}, []),
        ({"logprobs": {"tokens": ["token_id:5", "token_id:6"]}}, [5, 6]),
        ({"logprobs": {"tokens": ["the", " cat"]}}, []),
        ({"logprobs": None, "text": "the"}, []),
    ],
)
def test_token_ids(value, ids):
    assert token_ids(value) == ids


def test_flags():
    arguments = {
        "model": "/m", "dtype": "auto", "enforce_eager": True, "trust_remote_code": False,
        "enable_prefix_caching": False, "worker_extension_cls": "x.Y", "max_model_len": 9,
        "limit_mm_per_prompt": {"image": 0},
    }  # fmt: skip
    assert server_flags(arguments) == [
        "/m", "--dtype", "auto", "--enforce-eager", "--no-enable-prefix-caching",
        "--worker-extension-cls", "x.Y", "--max-model-len", "9",
        "--limit-mm-per-prompt", '{"image": 0}',
    ]  # fmt: skip
