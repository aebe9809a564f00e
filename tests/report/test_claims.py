"""Claims files: what they may hold, what is refused and how it is said, and what a claim allows."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.report.claim_metrics import METRICS
from evalsuite.report.claims import QUOTE_LIMIT, Claim, load_claims
from report.claims_files import SHIPPED, claim, shipped, small


def refused(text: str) -> str:
    with pytest.raises(ValidationError) as error:
        small(claim("first"), eval(text))
    return str(error.value)


def test_the_shipped_file_is_complete_and_quotes_little():
    claims = load_claims(SHIPPED)
    assert claims == shipped()
    sections = {c.where for c in claims.claim}
    assert {
        "headline table", "quick start", "validated deploy", "cache size tuning", "validated on", "architecture",
        "quantization details", "perplexity", "generation speed", "ecosystem", "GPU requirements", "required flags",
    } <= sections  # fmt: skip
    assert len(claims.claim) > 120
    assert all(len(c.quote.split()) <= 8 for c in claims.claim)


def test_every_quotation_holds_its_number():
    """A number that is not in the quoted words was mistyped; what a row or command implies is exempt."""
    implied = {"plugins", "custom_code", "overflow", "flag", "weight_bits", "experts_per_token", "host_ram"}
    for c in shipped().claim:
        if c.metric in implied or c.words is not None:
            continue
        figures = {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", c.quote)}
        wanted = {c.high} if c.high is not None else {c.value}
        assert wanted <= figures, f"{c.id}: {c.quote}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("claim(metric='sped')", "no metric 'sped'"),
        ("claim(unit='GB')", "speed has no unit 'GB'"),
        ("claim(unit='GB')", "it is given in tok/s"),
        ("claim(quote='')", "quote"),
        ("claim(quote='w' * 81)", "quote"),
        ("claim(value='fast')", "a number, not 'fast'"),
        ("claim(value=float('nan'))", "finite"),
        ("claim(low=1.0, high=2.0, value=3) | {'value': 3}", "one of value, low with high, or words"),
        ("claim(low=1.0)", "one of value, low with high, or words"),
        ("claim(low=2.0, high=1.0)", "low 2 is above high 1"),
        ("claim(colour='red')", "colour"),
        ("claim(metric='ratio', unit='x')", "names the two claims"),
        ("claim(of=['first', 'first'])", "nothing else has of"),
        ("claim(metric='ratio', unit='x', of=['first', 'none'])", "no claim 'none'"),
        ("claim(metric='flag', unit='', value='required')", "names its flag"),
        ("claim(metric='flag', unit='', value='nice', flag='--x')", "one of required, used"),
        ("claim(model='nobody')", "no model 'nobody'"),
        ("claim('first')", "two claims have the id 'first'"),
        ("claim(cache=0)", "cache"),
        ("claim(mode='lazy')", "mode"),
        ("claim(hit_rate=1.5)", "hit_rate"),
    ],
)
def test_what_is_no_claim_is_refused(text: str, said: str):
    assert said in refused(text)


def test_published_numbers_need_their_source():
    with pytest.raises(ValidationError, match="source that they were read in"):
        small(claim(), models={"m": {"title": "M", "published": {"layers": 40}}})


BAD_FILES = {
    "no toml": ("[card", "is not TOML", ""),
    "empty": ("", "no claims file", "card: Field required"),
    "unknown key": (
        '[card]\ntitle="t"\nsource="s"\n[models.m]\ntitle="M"\n[[claim]]\nid="x"\nwhere="w"\nquote="q"\nmodel="m"\n'
        'metric="speed"\nvalue=1\nunit="tok/s"\nspeed=3\n',
        "no claims file",
        "claim x.speed: unknown key; a claim may have gpu, cache",
    ),
    "missing quote": (
        '[card]\ntitle="t"\nsource="s"\n[models.m]\ntitle="M"\n[[claim]]\nid="x"\nwhere="w"\nmodel="m"\n'
        'metric="speed"\nvalue=1\nunit="tok/s"\n',
        "no claims file",
        "claim x.quote: Field required",
    ),
    "claim is no list": (
        'claim = 3\n[card]\ntitle="t"\nsource="s"\n[models.m]\ntitle="M"\n',
        "no claims file",
        "claim",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_says_where(tmp_path, name: str):
    text, what, cause = BAD_FILES[name]
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load_claims(path)
    assert what in error.value.what
    assert cause in error.value.cause
    assert error.value.exit_code == 2


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            load_claims(path)


def made(**keys) -> Claim:
    return Claim.model_validate(claim(**keys))


def test_what_a_claim_allows():
    assert made(value=6.56, metric="perplexity", unit="").allows(6.62)
    assert not made(value=6.56, metric="perplexity", unit="").allows(6.64)
    assert made(value=28, metric="layers", unit="").interval == (28, 28), "a count has no tolerance"
    assert made(value=10, tolerance=0.0).interval == (9.5, 10.5), "the last digit is a rounding"
    assert made(value=10, quote="10.00 tok/s", tolerance=0.0).interval == (9.995, 10.005), "as it was written"
    assert made(value=10.0, tolerance=0.2).allows(12.4)
    assert not made(value=30).allows(34.9)
    assert made(value=30, approximate=True).allows(34.9)
    assert made(low=40, high=60, metric="distinct_experts", unit="").allows(60)
    assert made(value=1.0, metric="vram", unit="GiB").number == 2**30
    assert made(words="—").interval is None


@given(value=st.floats(0.01, 1e6), metric=st.sampled_from(sorted(METRICS)), approximate=st.booleans())
def test_a_claim_allows_its_own_number(value: float, metric: str, approximate: bool):
    if metric in ("flag", "ratio"):
        return
    for unit in METRICS[metric].units:
        c = made(value=value, metric=metric, unit=unit, approximate=approximate)
        assert c.allows(c.number)
        low, high = c.interval
        assert low <= high
        assert math.isfinite(low)


def test_a_claim_as_its_reader_saw_it():
    assert made(value=37.4).text_of() == "37.4 tok/s"
    assert made(value=25, metric="vram", unit="GB", approximate=True).text_of() == "~25 GB"
    assert made(value=295680, metric="scored_tokens", unit="").text_of() == "295,680 tokens"
    assert made(value=1, metric="plugins", unit="").text_of() == "1 plugin"
    assert made(metric="ratio", value=2.3, unit="x", of=["a", "b"]).text_of() == "2.3×"
    assert made(words="not measured").text_of() == "“not measured”"
    flag = made(metric="flag", value="used", unit="", flag="--max-model-len", argument=4096)
    assert flag.text_of() == "--max-model-len 4096: used"
    assert QUOTE_LIMIT <= 80
