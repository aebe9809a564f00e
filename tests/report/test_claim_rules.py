"""The rules, one by one; and the shipped card's contradictions, found and, once mended, no longer found."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsuite.report.claim_verdicts import RULES, judge
from report.claims_files import claim, found, shipped, small

FLAG = {"metric": "flag", "unit": "", "flag": "--x"}
CACHED = {"gpu": "RTX PRO 6000", "cache": 8}


@dataclass(frozen=True)
class Flaw:
    """A contradiction of the shipped card: the rule and claims that show it, and a card without it."""

    what: str
    rule: str
    claims: tuple[str, ...]
    kind: str
    mended: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)


FLAWS = (
    Flaw("cache 8 is 37.4 and about 10 tok/s", "rival_figures", ("speed-cache", "tune-8-speed"), "contradicted",
         {"tune-8-speed": {"value": 37.0}}),
    Flaw("8 GB at cache 8 and at cache 128", "one_figure_for_two_caches", ("vram-cache", "qs-vram-cache"),
         "contradicted", {"tune-128-buffer": {"value": 8.3}}),
    Flaw("28 layers against the size", "layers_against_files", ("arch-layers",), "impossible",
         {"arch-layers": {"value": 40}}),
    Flaw("8 slots overflow with 8 experts", "overflow_in_decode", ("tune-8-overflow",), "impossible",
         {"tune-8-overflow": {"phase": "prefill"}}),
    Flaw("4 slots for 8 experts", "slots_for_one_token", ("gpu-4090-slots", "gpu-3090-slots"), "impossible",
         {"gpu-4090-slots": {"value": 8}, "gpu-3090-slots": {"value": 16}}),
    Flaw("top-2 models", "published", ("tune-nemotron", "tune-gemma"), "fails",
         {"tune-nemotron": {"value": 6}, "tune-gemma": {"value": 8}}),
    Flaw("the cached perplexity was taken without", "taken_elsewhere", ("ppl-cache",), "contradicted",
         {"vo-ppl-elsewhere": {"excludes": {"cache": 64}}}),
    Flaw("one perplexity for two models", "same_number_elsewhere", ("ppl", "eco-qwen9-ppl"), "note",
         {"eco-qwen9-ppl": {"value": 6.68}}),
    Flaw("a flag removed and required", "rival_figures", ("vd-lm-only", "rf-lm-only", "qs-lm-only"),
         "contradicted", {"vd-lm-only": {"value": "used"}}),
    Flaw("no plugin and a fork", "rival_figures", ("plugins-none", "qs-fork", "eco-plugins"), "contradicted",
         {"plugins-none": None, "eco-plugins": None}),
    Flaw("no code and trusted code", "code_of_its_own", ("custom-code-none",), "contradicted",
         {"qs-trust": None, "vd-trust": None}),
    Flaw("the baseline has no perplexity", "baseline_without_quality", ("ppl-bf16", "ppl-bf16-absent"), "note",
         {name: {"words": None, "value": 6.4} for name in ("ppl-bf16", "ppl-bf16-absent")}),
    Flaw("shifted columns", "words_for_number", ("gpu-a100-speed",), "note",
         {"gpu-a100-speed": {"words": None, "value": 20, "unit": "tok/s"}}),
    Flaw("64 slots overflow with at most 60 experts", "overflow_without_need",
         ("tune-64-overflow", "tune-distinct"), "contradicted", {"tune-distinct": {"high": 120}}),
    Flaw("two recommendations for one GPU", "rival_figures", ("tune-recommended", "gpu-pro-slots"),
         "contradicted", {"gpu-pro-slots": {"value": 128}}),
)  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda flaw: flaw.what)
def test_the_shipped_card(flaw: Flaw):
    raised = found(shipped())
    mended = found(shipped(flaw.mended, **flaw.tables))
    for name in flaw.claims:
        assert raised[flaw.rule, name] == flaw.kind
        assert (flaw.rule, name) not in mended


def test_every_rule_has_something_to_say_on_the_shipped_card():
    spoken = {rule.__name__ for rule in RULES for _ in rule(shipped())}
    assert {rule.__name__ for rule in RULES} == spoken


# ---------------------------------------------------------------- rivals


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"cache": 8, "gpu": "G"}, {"cache": 128, "gpu": "G"}),
        ({"cache": 8, "gpu": "G"}, {"cache": 8, "gpu": "H"}),
        ({"cache": 8, "gpu": "G"}, {"cache": 8}),
        ({"mode": "eager"}, {"mode": "graphs"}),
        ({"concurrency": 1}, {"concurrency": 8}),
        ({"context": 512}, {"context": 4096}),
        ({"model": "m"}, {"model": "other"}),
        ({"value": 10}, {"value": 10.5}),
        ({"value": 10, "approximate": True}, {"value": 12}),
        ({"words": "—"}, {}),
    ],
)
def test_different_conditions_or_close_figures_are_no_rivals(one: dict[str, Any], other: dict[str, Any]):
    two = {"value": 20} if "value" not in other else {}
    claims = small(claim("a", **one), claim("b", **two | other))
    assert not {key for key in found(claims) if key[0] == "rival_figures"}


@pytest.mark.parametrize("shared", [{}, {"cache": 8, "gpu": "G"}, {"mode": "eager"}])
def test_like_conditions_and_distant_figures_are_rivals(shared: dict[str, Any]):
    claims = small(claim("a", **shared), claim("b", value=20, policy="lfru", **shared))
    assert {key for key in found(claims) if key[0] == "rival_figures"} == {
        ("rival_figures", "a"), ("rival_figures", "b")
    }  # fmt: skip


@given(
    first=st.floats(1, 100),
    second=st.floats(1, 100),
    tolerance=st.floats(0, 0.5),
)
def test_rivals_are_claims_that_no_number_satisfies(first: float, second: float, tolerance: float):
    claims = small(
        claim("a", value=first, tolerance=tolerance), claim("b", value=second, tolerance=tolerance)
    )
    a, b = claims.claim
    low, high = max(a.interval[0], b.interval[0]), min(a.interval[1], b.interval[1])
    both = low <= high and a.allows((low + high) / 2) and b.allows((low + high) / 2)
    assert (("rival_figures", "a") in found(claims)) == (not both)


def test_a_flag_that_one_version_removed_is_no_rival_of_another_version():
    removed = claim("a", **FLAG | {"value": "removed"}, vllm="0.17")
    assert found(small(removed, claim("b", **FLAG | {"value": "required"}, vllm="0.17")))
    assert not found(small(removed, claim("b", **FLAG | {"value": "required"}, vllm="0.26")))
    assert not found(small(removed, claim("b", **FLAG | {"value": "required", "flag": "--y"})))
    assert not found(
        small(claim("a", **FLAG | {"value": "used"}), claim("b", **FLAG | {"value": "required"}))
    )


def test_equal_memory_is_no_contradiction_where_few_slots_lie_between():
    vram = {"metric": "vram", "unit": "GB", "value": 8}
    near = small(claim("a", **vram, cache=8), claim("b", **vram, cache=12))
    assert not found(near)
    assert ("one_figure_for_two_caches", "a") in found(
        small(claim("a", **vram, cache=8), claim("b", **vram, cache=120))
    )


def test_a_claim_that_holds_leaves_the_contradiction_to_its_rival():
    verdicts = {item.claim.id: item.verdict for item in judge(shipped())}
    assert verdicts["tune-128-buffer"] == "holds"
    assert verdicts["vram-cache"] == "contradicted"


def test_a_ratio_falls_with_its_parts_and_stands_with_them():
    verdicts = {item.claim.id: item for item in judge(shipped())}
    assert verdicts["faster-cache"].verdict == "contradicted"
    assert "rests on" in verdicts["faster-cache"].why
    assert verdicts["gs-smaller"].verdict == "holds"
    assert verdicts["faster"].verdict == "not measured"


def test_a_cache_faster_than_all_experts_on_the_gpu_is_asked_about():
    whole = claim("all", gpu="G", cache="all")
    assert found(small(claim("a", value=20, gpu="G", cache=8), whole)) == {("faster_with_less", "a"): "note"}
    assert not found(small(claim("a", value=10.2, gpu="G", cache=8), whole))


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("value", "kind"), [(2.3, None), (2.31, None), (2.5, "impossible"), (2.0, "impossible")]
)
def test_a_ratio_is_recomputed(value: float, kind: str | None):
    claims = small(
        claim("a", value=37.4), claim("b", value=16.2, model="b"),
        claim("r", "ratio", value, "x", of=["a", "b"], quote=f"{value}x"),
    )  # fmt: skip
    assert found(claims).get(("quotients", "r")) == kind


def test_a_sum_is_recomputed():
    disk = {"metric": "disk", "unit": "GB"}
    parts = (claim("a", **disk, value=20, component="x"), claim("b", **disk, value=31, component="y"))
    assert not found(small(*parts, claim("s", **disk, value=51, component="peak", sum_of=["a", "b"])))
    wrong = small(*parts, claim("s", **disk, value=70, component="peak", sum_of=["a", "b"]))
    assert found(wrong) == {("sums", "s"): "impossible"}


def test_windows_times_scored_tokens():
    def tokens(name: str, windows: int, value: int):
        return claim(name, "scored_tokens", value, "", windows=windows, text="t")

    right = [tokens("a", 200, 51_200), tokens("b", 500, 128_000)]
    assert not found(small(*right))
    assert found(small(*right, tokens("c", 1155, 295_681))) == {("windows_and_tokens", "c"): "impossible"}
    assert found(small(*right, tokens("c", 1155, 1155 * 255))) == {("windows_and_tokens", "c"): "impossible"}


def test_windows_of_a_known_text():
    verdict, other = judge(
        small(claim("a", "windows", 1155, "", text="wikitext-2"), claim("b", "windows", 1154, "", text="x"))
    )
    assert verdict.verdict == "holds"
    assert "card-1155" in verdict.why
    assert other.verdict == "not measured"
    assert found(small(claim("a", "windows", 1200, "", text="wikitext-2"))) == {
        ("windows_of_text", "a"): "note"
    }


def test_prefixes_imply_segments_that_can_be():
    def prefix(name: str, windows: int, value: float):
        return claim(name, "perplexity", value, "", windows=windows, text="t")

    verdicts = judge(small(prefix("a", 200, 6.58), prefix("b", 500, 6.41), prefix("c", 1000, 6.58)))
    assert [item.shown for item in verdicts] == ["", "6.30 there", "6.75 there"]
    impossible = small(prefix("a", 1000, 6.58), prefix("b", 1100, 5.0))
    assert found(impossible) == {("prefixes", "b"): "impossible"}


@pytest.mark.parametrize(
    ("metric", "value", "unit", "keys", "verdict"),
    [
        ("download", 19.5, "GB", {}, "holds"),
        ("download", 19.4, "GiB", {}, "not measured"),  # 20.8 GB: a vision tower may be in it
        ("download", 15.0, "GB", {}, "impossible"),
        ("download", 30.0, "GB", {}, "impossible"),
        ("download", 72, "GB", {"model": "b"}, "holds"),
        ("parameters", 35, "billion", {}, "holds"),
        ("parameters", 30, "billion", {}, "impossible"),
        ("active_parameters", 3, "billion", {"approximate": True}, "holds"),
        ("active_parameters", 8, "billion", {}, "impossible"),
        ("expert_buffer", 8.3, "GB", {"cache": 128}, "holds"),
        ("expert_buffer", 8.3, "GB", {"cache": 64}, "impossible"),
        ("expert_buffer", 16.6, "GB", {"cache": "all"}, "holds"),
        ("expert_buffer", 8.3, "GB", {}, "not measured"),
        ("vram", 15, "GB", {"cache": "all"}, "impossible"),
        ("vram", 25, "GB", {"cache": "all"}, "not measured"),
        ("vram", 2, "GB", {"cache": 8}, "impossible"),
        ("vram", 40, "GB", {"cache": "all", "gpu": "RTX 4090"}, "impossible"),
        ("layers", 40, "", {}, "holds"),
        ("layers", 41, "", {}, "fails"),
        ("experts", 256, "", {}, "holds"),
        ("experts_per_token", 2, "", {}, "fails"),
        ("experts_per_token", 2, "", {"model": "other"}, "not measured"),
        ("gpu_memory", 24, "GB", {"gpu": "RTX 4090"}, "holds"),
        ("gpu_memory", 102, "GB", {"gpu": "RTX PRO 6000"}, "holds"),
        ("gpu_memory", 48, "GB", {"gpu": "RTX 4090"}, "fails"),
        ("gpu_memory", 48, "GB", {"gpu": "unheard of"}, "not measured"),
        ("cache_slots", 8, "", {}, "not measured"),
        ("cache_slots", 7, "", {}, "impossible"),
        ("cache_slots", 4, "", {"model": "other"}, "not measured"),
        ("overflow", 100, "%", {"cache": 8}, "impossible"),
        ("overflow", 100, "%", {"cache": 4}, "not measured"),
        ("overflow", 20, "%", {"cache": 8}, "not measured"),
        ("disk", 31, "GB", {"component": "expert cache"}, "not measured"),
        ("disk", 10, "GB", {"component": "expert cache"}, "impossible"),
        ("disk", 10, "GB", {"component": "hub cache"}, "not measured"),
        # bounds: 2.31 GB a token at 1,792 GB/s; 519 MB of missing experts at 63 GB/s
        ("speed", 700, "tok/s", {"gpu": "RTX PRO 6000"}, "not measured"),
        ("speed", 900, "tok/s", {"gpu": "RTX PRO 6000"}, "impossible"),
        ("speed", 900, "tok/s", {"gpu": "RTX PRO 6000", "concurrency": 8}, "not measured"),
        ("speed", 900, "tok/s", {"gpu": "unheard of"}, "not measured"),
        ("speed", 700, "tok/s", {"gpu": "RTX PRO 6000", "cache": 64}, "not measured"),
        ("speed", 700, "tok/s", {"gpu": "RTX PRO 6000", "cache": 64, "hit_rate": 1.0}, "not measured"),
        ("speed", 400, "tok/s", {"gpu": "RTX PRO 6000", "cache": 64, "hit_rate": 0.5}, "impossible"),
        ("speed", 150, "tok/s", {"gpu": "RTX PRO 6000", "cache": 4}, "impossible"),
        ("speed", 100, "tok/s", {"gpu": "RTX PRO 6000", "cache": 4}, "not measured"),
    ],
)
def test_one_claim_against_geometry_and_bounds(metric, value, unit, keys, verdict):
    (item,) = judge(small(claim("a", metric, value, unit, **keys)))
    assert item.verdict == verdict, item.why


def test_a_cache_saves_at_most_the_experts_that_leave():
    def vram(name: str, value: float, cache: int | str):
        return claim(name, "vram", value, "GB", cache=cache, gpu="RTX PRO 6000")

    assert not found(small(vram("all", 25, "all"), vram("a", 10, 8)))
    assert found(small(vram("all", 25, "all"), vram("a", 8, 8))) == {("memory_saved", "a"): "note"}
    assert found(small(vram("all", 50, "all"), vram("a", 8, 8))) == {("memory_saved", "a"): "impossible"}
    assert found(small(vram("all", 25, "all"), vram("a", 8, 250))).keys() == {
        ("memory_for_weights", "a"), ("memory_saved", "a")
    }  # fmt: skip


def test_what_is_taken_fits_the_machine():
    there = claim("ssd", "disk_installed", 40, "GB")
    assert found(small(there, claim("a", "disk", 51, "GB", component="hub cache"))) == {
        ("capacities", "a"): "impossible"
    }
    assert not found(small(there, claim("a", "disk", 35, "GB", component="hub cache")))
