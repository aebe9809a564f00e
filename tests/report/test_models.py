"""What models are and how they were served, from records and configurations."""

from evalsuite.report.models import Configured, architecture_table, flags_table, models_table
from evalsuite.report.tables import Column
from evalsuite.report.varying import settle
from report.record_files import model, speed_record


def rows(table):
    return [dict(zip([column.title for column in table.columns], row, strict=True)) for row in table.cells()]


def test_dummy_weights_have_no_size():
    nothing = model("dummy", "dummy weights (INT4 geometry)").model_copy(update={"stored_bytes": 0})
    found = rows(models_table([speed_record("a"), speed_record("b", model=nothing)]))
    assert [row["on disk"] for row in found] == ["2", "—"]


def test_a_configuration_with_its_text_part_inside():
    config = {
        "text_config": {
            "num_hidden_layers": 4, "hidden_size": 2048, "num_experts": 256, "num_experts_per_tok": 8,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        },
        "quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}},
    }  # fmt: skip
    (row,) = rows(architecture_table([Configured("m", config)]))
    assert row["attention"] == "3 linear, 1 full"
    assert (row["layers"], row["hidden size"], row["experts a layer"]) == ("4", "2,048", "256")
    assert row["quantized"] == "4 bits, group 128"
    assert "MLP width" not in row, "what no model has is no column"


def test_a_plain_configuration():
    (row,) = rows(architecture_table([Configured("m", {"num_hidden_layers": 2, "intermediate_size": 64})]))
    assert (row["attention"], row["quantized"], row["MLP width"]) == ("full in every layer", "no", "64")


def test_flags_are_what_was_asked_and_what_was_on():
    record = speed_record(size=8, eager=True)
    engaged = {**record.engaged, "attention": {"FLASH_ATTN": 11}, "cudagraph_mode": "NONE"}
    (row,) = rows(flags_table([record.model_copy(update={"engaged": engaged})]))
    assert row["engine"] == "vllm 0.26.0"
    assert row["asked for"] == "--enforce-eager --moe-expert-cache-size 8"
    assert row["was on"] == "mode: eager; attention: FLASH_ATTN"


def test_labels_that_do_not_vary_are_said_once():
    labels = [
        Column[tuple[str, ...]](title, lambda r, i=i: r[i], label=True)
        for i, title in enumerate(("model", "mode", "note"))
    ]
    shown, said = settle(labels, [("a", "eager", ""), ("b", "eager", "")])
    assert [column.title for column in shown] == ["model"]
    assert said == "All: mode eager."
    shown, said = settle(labels, [("a", "eager", "")])
    assert [column.title for column in shown] == ["model"]
