"""Tiny models on disk, made once; and those of the quantizer's tests."""

import pytest
import transformers
from quant.conftest import checkpoints, stacked  # noqa: F401 (fixtures)

from engines import tiny

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BUILDERS = {"llama": tiny.llama, "qwen3_5_moe": tiny.qwen3_5_moe}


@pytest.fixture(scope="session", params=BUILDERS)
def model_and_folder(request, tmp_path_factory):
    """A random model in float32 and its checkpoint."""
    model = BUILDERS[request.param]().eval()
    return model, tiny.write(model, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture
def llama_folder(tmp_path):
    return tiny.write(tiny.llama(), tmp_path / "llama")
