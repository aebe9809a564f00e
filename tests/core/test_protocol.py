"""Protocols as values: presets, overrides, and what is refused and how."""

import pytest
from pydantic import ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.core.protocol import PROTOCOLS, WindowProtocol, protocol

# every choice of every preset, from the sources that core/protocol.py names
PRESETS = {
    "card-1155": (1536, 256, "stride", "like-others", "drop", "blank-line", "never"),
    "hf": (2048, 512, "stride", "whole", "short", "blank-line", "text"),
    "gptq": (2048, 2048, "stride", "like-others", "drop", "blank-line", "never"),
    "llama.cpp": (512, 512, "second-half", "like-others", "drop", "raw", "each-window"),
    "paper": (2048, 512, "stride", "like-others", "drop", "blank-line", "never"),
}


def test_presets_are_what_their_sources_say():
    found = {
        p.name: (p.context, p.stride, p.scored, p.first_window, p.tail, p.join, p.bos)
        for p in PROTOCOLS.values()
    }
    assert found == PRESETS
    assert {p.averaging for p in PROTOCOLS.values()} == {"token"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_name_and_reads_back_from_json(name: str):
    preset = protocol(name)
    assert preset.name == name
    assert WindowProtocol.model_validate_json(preset.model_dump_json()) == preset


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(UsageError) as caught:
        protocol("card1155")
    assert "'card1155'" in caught.value.what
    for name in PRESETS:
        assert name in caught.value.todo


def test_a_protocol_cannot_be_changed_and_knows_its_fields():
    with pytest.raises(ValidationError, match="frozen"):
        protocol("hf").context = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="strides"):
        WindowProtocol.model_validate({"name": "x", "context": 8, "stride": 4, "strides": 4})
    with pytest.raises(ValidationError, match="averaging"):
        WindowProtocol.model_validate({"name": "x", "context": 8, "stride": 4, "averaging": "window"})


class TestOverride:
    def test_without_values_it_is_the_same_protocol(self):
        for preset in PROTOCOLS.values():
            assert preset.override() is preset
            assert preset.override(preset.context, preset.stride) == preset

    def test_a_changed_choice_marks_the_name_once(self):
        changed = protocol("hf").override(stride=256)
        assert (changed.name, changed.context, changed.stride) == ("hf*", 2048, 256)
        assert changed.override(context=1024).name == "hf*"

    def test_nothing_but_context_and_stride_changes(self):
        for preset in PROTOCOLS.values():
            changed = preset.override(context=2 * preset.context)
            same = {"join", "scored", "first_window", "tail", "bos", "averaging"}
            assert changed.model_dump(include=same) == preset.model_dump(include=same)

    @pytest.mark.parametrize("name", ["gptq", "llama.cpp"])
    def test_disjoint_windows_stay_disjoint(self, name: str):
        changed = protocol(name).override(context=1024)
        assert (changed.context, changed.stride) == (1024, 1024)
        assert changed.disjoint

    def test_a_stride_given_for_disjoint_windows_is_taken(self):
        changed = protocol("gptq").override(stride=512)
        assert (changed.context, changed.stride, changed.disjoint) == (2048, 512, False)

    def test_overlapping_windows_keep_their_stride(self):
        assert protocol("card-1155").override(context=4096).stride == 256

    @pytest.mark.parametrize(
        ("name", "context", "stride", "reason"),
        [
            ("card-1155", 100, None, "stride 256 is larger than context 100"),
            ("hf", None, 4096, "stride 4096 is larger than context 2048"),
            ("hf", 2048, 0, "greater than or equal to 1"),
            ("hf", 2048, -256, "greater than or equal to 1"),
            ("gptq", 1, None, "greater than or equal to 2"),
            ("card-1155", 0, 0, "greater than or equal to 2"),
        ],
    )
    def test_an_impossible_override_is_refused_in_words(
        self, name: str, context: int | None, stride: int | None, reason: str
    ):
        with pytest.raises(UsageError) as caught:
            protocol(name).override(context, stride)
        error = caught.value
        assert error.exit_code == 2
        for given in (context, stride):
            assert given is None or str(given) in error.what
        assert reason in error.cause
        assert "stride between 1 and the context" in error.todo
        # the reader is no Python programmer
        for noise in ("pydantic", "input_value", "type=", "validation error", "WindowProtocol"):
            assert noise not in str(error)


class TestSecondHalf:
    """Scoring the second half is llama.cpp's; it makes sense for disjoint windows of some length only."""

    def test_it_is_refused_with_a_short_tail_or_a_whole_first_window(self):
        for change in ({"tail": "short"}, {"first_window": "whole"}):
            with pytest.raises(ValidationError, match="full windows only"):
                WindowProtocol.model_validate(protocol("llama.cpp").model_dump() | change)

    def test_a_stride_that_would_score_tokens_twice_is_refused(self):
        with pytest.raises(UsageError):
            protocol("llama.cpp").override(stride=100)

    def test_a_context_that_would_score_nothing_is_refused(self):
        with pytest.raises(UsageError):
            protocol("llama.cpp").override(context=2)


def test_describe_holds_the_numbers_that_decide_the_result():
    assert protocol("card-1155").describe() == "card-1155: context 1536, stride 256, last 256 scored"
    assert protocol("hf").describe().endswith("last 512 scored, first window whole")
    assert "second half scored" in protocol("llama.cpp").describe()
