"""`hlwq-eval card` as a user runs it."""

import json
from pathlib import Path

from huggingface_hub import ModelCard

RESULTS = Path(__file__).resolve().parents[2] / "results"
INT4 = "demo-rtn-int4-0ffffe92"


def test_a_card_of_one_model(cli, tmp_path):
    done = cli(
        "card", INT4, "--results", RESULTS, "--out", "cards/CARD.md", "--license", "apache-2.0", "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["model"] == INT4
    card = ModelCard.load(tmp_path / "cards" / "CARD.md")
    assert card.data.eval_results
    assert card.data.license == "apache-2.0"
    assert list((tmp_path / "cards" / "figures").glob("*.png"))
    assert f"card of {INT4} from {len(document['runs'])} runs" in done.said


def test_what_cannot_be_made_into_a_card(cli, tmp_path):
    for arguments, said in (
        ((), "no folder results"),
        (("--results", RESULTS), "name one: "),
        (("x", "--results", RESULTS), "No run measured 'x'"),
        ((INT4, "--results", RESULTS, "--out", "."), "is a folder"),
    ):
        done = cli("card", *arguments)
        assert done.code == 2
        assert said in done.said
    assert not any(tmp_path.iterdir())
