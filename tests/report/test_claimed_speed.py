"""What a card claims of decode speed, beside what was measured."""

import pytest

from evalsuite.report.claimed_speed import claimed_speed_table, one_sequence
from evalsuite.report.claims import load_claims
from evalsuite.store.runs import load_runs
from report.record_files import speed_record, store

CLAIMS = """
[card]
title = "A card"
source = "https://example.org/card"

[models.int4]
title = "A model, INT4"
names = ["m"]
stored = "INT4"

[models.other]
title = "Another model, never measured"
stored = "INT4"

"""


def claim(name: str, value: float, cache: object, model: str = "int4", **more: object) -> str:
    given = {"id": name, "where": "a table", "quote": str(value), "model": model, "metric": "speed"}
    given |= {"value": value, "unit": "tok/s", "cache": cache, "gpu": "RTX PRO 6000"} | more
    lines = (f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for key, v in given.items())
    return "[[claim]]\n" + "\n".join(lines) + "\n\n"


@pytest.fixture
def claims(tmp_path):
    def load(*parts: str):
        path = tmp_path / "claims.toml"
        path.write_text(CLAIMS + "".join(parts))
        return load_claims(path)

    return load


def rows(table):
    return [dict(zip(table.headings(), cells, strict=True)) for cells in table.cells()]


def test_claims_stand_beside_the_cells_of_their_cache_size_and_mode(claims, tmp_path):
    found = claims(
        claim("all", 23.6, "all"),
        claim("eight", 37.4, 8),
        claim("eight-too", 10, 8, approximate=True),
        claim("unheard", 99.0, "all", model="other"),
    )
    results = store(
        tmp_path / "results",
        speed_record("m", 200.0, stamp="20261101T000001Z"),
        speed_record("m", 9.0, eager=True, stamp="20261101T000002Z"),
        speed_record("m", 60.0, size=8, stamp="20261101T000003Z"),
        speed_record("m", 70.0, size=64, stamp="20261101T000004Z"),
    )
    table = claimed_speed_table(found, one_sequence(load_runs(results)[0]))
    card, eager, graphs = (
        "the card, RTX PRO 6000 [tok/s] (claimed)",
        "eager, H100 [tok/s] ↑",
        "graphs, H100 [tok/s] ↑",
    )
    eight, resident = rows(table)
    assert (eight["model"], eight[card]) == ("INT4, 8 experts cached", "37.4; ~10")
    assert (eight[eager], eight[graphs]) == ("—", "60.0 ± 1.0")
    assert (resident["model"], resident[card]) == ("INT4, all experts resident", "23.6")
    assert (resident[eager], resident[graphs]) == ("9.0 ± 1.0", "200.0 ± 1.0")


def test_a_skewed_draw_and_a_store_on_disk_are_not_what_a_claim_is_held_against(claims, tmp_path):
    def cell(decode, stamp, **changes):
        found = speed_record("m", decode, size=8, stamp=stamp)
        spec = found.spec | {"serving": found.spec["serving"] | changes}
        return found.model_copy(
            update={"spec": spec, "spec_hash": f"{found.spec_hash}{len(changes)}{changes}"}
        )

    results = store(
        tmp_path / "results",
        cell(60.0, "20261101T000001Z"),
        cell(90.0, "20261101T000002Z", moe_routing="zipf:1"),
        cell(30.0, "20261101T000003Z", moe_expert_store="disk"),
    )
    table = claimed_speed_table(claims(claim("eight", 37.4, 8)), one_sequence(load_runs(results)[0]))
    ((_, _, measured),) = table.cells()
    assert measured.startswith("60")


def test_where_a_card_names_several_gpus_each_number_has_its_own(claims, tmp_path):
    found = claims(claim("a", 30.0, "all"), claim("b", 15.0, "all", gpu="RTX 3090"))
    results = store(tmp_path / "results", speed_record("m", 200.0))
    (resident,) = rows(claimed_speed_table(found, one_sequence(load_runs(results)[0])))
    assert resident["the card [tok/s] (claimed)"] == "30 (RTX PRO 6000); 15 (RTX 3090)"


def test_several_requests_at_once_and_failed_cells_are_not_a_card_s_speed(tmp_path):
    results = store(tmp_path / "results", speed_record("m", status="oom", stamp="20261101T000001Z"))
    assert one_sequence(load_runs(results)[0]) == []
