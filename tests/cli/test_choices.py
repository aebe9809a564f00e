"""How flags of several commands are read."""

import pytest

from evalsuite.cli.choices import json_object, numbers, one_gpu, sizes, words
from evalsuite.core.errors import UsageError


@pytest.mark.parametrize(("text", "found"), [("0", (0,)), ("1, 0", (1, 0))])
def test_indices_of_gpus(text, found):
    assert numbers("--gpus", text, 0) == found


@pytest.mark.parametrize("text", ["", "a", "0,", "-1", "0,0", "²"])
def test_what_is_no_list_of_gpus(text):
    with pytest.raises(UsageError, match="--gpus"):
        numbers("--gpus", text, 0)


def test_all_experts_come_last():
    assert sizes("--cache-sizes", "all, 8,4") == (8, 4, "all")
    assert sizes("--cache-sizes", "all") == ("all",)


@pytest.mark.parametrize("text", ["", "0", "all,all", "8,8", "many", "-8"])
def test_what_is_no_list_of_sizes(text):
    with pytest.raises(UsageError, match="--cache-sizes"):
        sizes("--cache-sizes", text)


def test_one_gpu():
    assert (one_gpu(None), one_gpu("3")) == ((), (3,))
    for text in ("0,1", "a", "²", "-1"):
        with pytest.raises(UsageError, match="is not the index of one GPU"):
            one_gpu(text)


def test_words_come_once_and_in_small_letters():
    assert words("--gpu", "H100, rtx-4090,h100,") == ("h100", "rtx-4090")
    with pytest.raises(UsageError, match="--gpu names nothing"):
        words("--gpu", " ,")


def test_json_objects():
    assert json_object("--x", None) == {}
    assert json_object("--x", '{"a": [1]}') == {"a": [1]}
    for text in ("{", "[1]", "null"):
        with pytest.raises(UsageError, match="--x"):
            json_object("--x", text)
