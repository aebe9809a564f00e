"""How flags of several commands are read."""

import pytest

from evalsuite.cli.choices import json_object, numbers, one_device, sizes
from evalsuite.core.errors import UsageError


@pytest.mark.parametrize(("text", "found"), [("0", (0,)), ("1, 0", (1, 0))])
def test_indices_of_gpus(text, found):
    assert numbers("--gpus", text, 0) == found


@pytest.mark.parametrize("text", ["", "a", "0,", "-1", "0,0", "²"])
def test_what_is_no_list_of_gpus(text):
    with pytest.raises(UsageError, match="--gpus"):
        numbers("--gpus", text, 0)


def test_all_experts_come_last():
    assert sizes("--cache-sizes", "all, 8,4") == (8, 4, None)
    assert sizes("--cache-sizes", "all") == (None,)


@pytest.mark.parametrize("text", ["", "0", "all,all", "8,8", "many", "-8"])
def test_what_is_no_list_of_sizes(text):
    with pytest.raises(UsageError, match="--cache-sizes"):
        sizes("--cache-sizes", text)


def test_one_device():
    assert (one_device(None, "why"), one_device("3", "why")) == ("auto", "cuda:3")
    with pytest.raises(UsageError, match="why"):
        one_device("0,1", "why")


def test_json_objects():
    assert json_object("--x", None) == {}
    assert json_object("--x", '{"a": [1]}') == {"a": [1]}
    for text in ("{", "[1]", "null"):
        with pytest.raises(UsageError, match="--x"):
            json_object("--x", text)
