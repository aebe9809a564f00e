"""GPU requirements: measured rows as they were, derived rows by arithmetic, and each says which it is."""

from evalsuite.core.geometry import Geometry
from evalsuite.experts.gpus import GPUS
from evalsuite.experts.predict import RESERVE_BYTES
from evalsuite.report.requirements import CONTEXT, needs, requirements_table
from report.record_files import speed_record

# 10 layers of 100 experts of 100 MB: 100 GB of experts on 5 GB of the rest
GEOMETRY = Geometry(
    total_bytes=105_000_000_000, dense_bytes=5_000_000_000, row_bytes=4096, expert_bytes=100_000_000,
    expert_layers=10, experts=100, top_k=4, kv_bytes_per_token=1000, state_bytes=0, token_weights=1,
    context=None,
)  # fmt: skip


def rows():
    runs = [speed_record("m", 50.0, weights=20_000_000_000), speed_record("m", status="oom", eager=True)]
    table = requirements_table("m", GEOMETRY, needs(GEOMETRY, runs))
    keys = [column.title for column in table.columns]
    return table, [dict(zip(keys, row, strict=True)) for row in table.grid()]


def test_a_measured_row_is_the_record():
    _, (done, failed, *_) = rows()
    assert (done["GPU"].text, done["decode"].text) == ("H100, graphs", "50.0 ± 1.0")
    assert (done["weights"].text, done["weights"].origin) == ("20.0", "measured")
    assert done["reserved by the engine"].text == "78.0"
    assert done["needed"].origin == "not measured"
    assert done["decode"].runs == (speed_record("m").run_id,)
    assert (failed["fits"].text, failed["fits"].origin) == ("out of memory", "failed")
    assert failed["decode"].origin == "not measured"


def test_the_largest_cache_that_fits_by_hand():
    _, found = rows()
    mine = [row for row in found if row["GPU"].text == GPUS["rtx-4090"].name]
    # 24 GiB less 5 GB, a context of keys and values, and the reserve, in slots of 10 × 100 MB
    room = 24 * 2**30 - 5_000_000_000 - CONTEXT * 1000 - RESERVE_BYTES
    assert [row["experts on the device"].text for row in mine] == ["all", str(room // 1_000_000_000)]
    whole, cached = mine
    assert whole["fits"].text == "no"
    assert whole["decode"].origin == "not measured", "what does not fit has no speed"
    assert cached["fits"].text == "yes"
    slots = int(cached["experts on the device"].text)
    assert cached["weights"].text == f"{5 + slots:.1f}"
    assert cached["decode"].text.startswith("≤ ")


def test_every_derived_number_says_so():
    table, found = rows()
    for row in found[2:]:
        assert {row[key].origin for key in ("weights", "needed", "fits")} == {"derived"}
        assert row["memory"].origin == "claimed"
        assert not any(cell.runs for cell in row.values())
    assert "which is an assumption" in table.caption
