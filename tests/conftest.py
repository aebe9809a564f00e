"""Real data where it is to be had, and tiny models made on the spot."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before a library reads it: no test waits for the hub

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_expert_files(tmp_path_factory: pytest.TempPathFactory):
    """No test finds, or leaves, expert files among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLWQ_EVAL_CACHE", str(tmp_path_factory.mktemp("expert_files")))
        yield


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The built-in model."""
    return ROOT / "evalsuite" / "demo"


@pytest.fixture(scope="session")
def wikitext_folder() -> Path:
    """A folder with the raw WikiText-2 test split, from HLWQ_EVAL_DATA or from beside the checkout."""
    for folder in (os.environ.get("HLWQ_EVAL_DATA", ""), str(SHARED / "wikitext-2-raw")):
        if folder and (Path(folder) / "wiki.test.raw").is_file():
            return Path(folder)
    pytest.skip("WikiText-2 is not here: set HLWQ_EVAL_DATA to a folder with wiki.test.raw")


@pytest.fixture(scope="session")
def qwen_tokenizer_folder() -> Path:
    """A folder with the Qwen3.5 tokenizer."""
    folder = SHARED / "tokenizers" / "qwen3.5"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the Qwen3.5 tokenizer is not beside the checkout")
    return folder
