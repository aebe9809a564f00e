"""Experiment files of steps: what they may say, and what follows from it."""

import pytest

from evalsuite.core.errors import UsageError
from evalsuite.experiment.evaluation import Evaluation, name_of
from evalsuite.experiment.load import load_experiment
from evalsuite.run.options import PerplexityOptions, SpeedOptions

PAIR = """
question = "Which?"
candidate = "a"
baseline = "demo"

[[steps]]
command = "ppl"
limit = 30

[[steps]]
command = "speed"
cache_sizes = [8, "all"]
concurrency = 8

[[steps]]
name = "small"
command = "footprint"
models = ["candidate"]
load_format = "dummy"

[[steps]]
command = "cache"
requests = 2
sizes = 4
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pair.toml"

    def write(text=PAIR):
        path.write_text(text)
        return path

    return write


def test_a_step_means_what_its_command_means(file):
    evaluation = load_experiment(file())
    assert isinstance(evaluation, Evaluation)
    ppl, speed, footprint, cache = evaluation.chosen(())
    assert ppl.spec("a", "demo") == PerplexityOptions(limit=30, corpus="builtin").spec("a", "demo")
    assert speed.sweep(("a",), 0) == SpeedOptions(
        cache_sizes=[8, "all"], concurrency=[8], corpus="builtin"
    ).sweep(("a",), 0)
    assert footprint.spec("a").workload.corpus == "builtin"
    assert (cache.request("a").requests, cache.slots) == (2, [4])


def test_one_text_for_all_steps(file):
    """Also where only one of the models takes part, and unless a step says another."""
    both = load_experiment(file()).chosen(())
    assert {step.corpus for step in both} == {"builtin"}
    other = load_experiment(file(PAIR.replace('"demo"', '"b"')))
    assert [step.corpus for step in other.chosen(())] == ["wikitext-2", "wikitext-2", "builtin", "wikitext-2"]
    named = load_experiment(file('corpus = "text.txt"\n' + PAIR + 'corpus = "mine.txt"\n'))
    assert [step.corpus for step in named.chosen(())] == ["text.txt"] * 3 + ["mine.txt"]


def test_steps_are_chosen_by_name_or_command(file):
    evaluation = load_experiment(file())
    assert [name_of(step) for step in evaluation.chosen(("speed", "small"))] == ["speed", "small"]
    assert [name_of(step) for step in evaluation.chosen(("footprint",))] == ["small"]
    with pytest.raises(UsageError, match="--only sped") as found:
        evaluation.chosen(("sped",))
    assert "ppl, speed, small, cache" in found.value.todo


def test_a_limit_only_lowers(file):
    evaluation = load_experiment(file())
    assert [evaluation.limited(count).steps[0].limit for count in (5, 50)] == [5, 30]


def test_the_models_of_a_step(file):
    evaluation = load_experiment(file())
    assert evaluation.roles(evaluation.steps[0]) == ("candidate", "baseline")
    assert evaluation.roles(evaluation.steps[2]) == ("candidate",)
    alone = load_experiment(file(PAIR.replace('baseline = "demo"', "")))
    assert alone.roles(alone.steps[0]) == ("candidate",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("limit = 30", "limits = 30"), "steps.1.limits: Extra inputs"),
        (("limit = 30", "limit = 0"), "steps.1.limit: "),
        (("cache_sizes = [8", "cache_sizes = [8, 8"), "a value is there twice"),
        (("concurrency = 8", 'modes = "fast"'), "steps.2.modes"),
        (('command = "cache"', 'command = "cash"'), "steps.4"),
        (('name = "small"', 'name = "Speed"'), "two steps have the same name"),
        (('candidate = "a"', ""), "either it names a candidate"),
        (('command = "ppl"\nlimit = 30', 'command = "quantize"\nrecipe = {}'), "either it names a candidate"),
        (
            ('command = "cache"\nrequests = 2\nsizes = 4', 'command = "quantize"\nrecipe = {}'),
            "only the first step",
        ),
        (("[[steps]]", "[[arms]]\nname = 'x'\n[[steps]]"), "both arms and steps"),
        (("[[steps]]", "[[stages]]"), "neither arms nor steps"),
        (('models = ["candidate"]', "models = []"), "steps.3.models"),
        (
            ('command = "cache"\nrequests = 2\nsizes = 4', 'command = "report"\nformats = "pdf"'),
            "there is no 'pdf'",
        ),
        (
            ('command = "cache"\nrequests = 2\nsizes = 4', 'command = "check"\nclaims = "x"\nfail_on = "no"'),
            "there is no 'no'",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_meant_is_refused(change, message, file):
    with pytest.raises(UsageError) as found:
        load_experiment(file(PAIR.replace(*change)))
    assert message in str(found.value)


def test_a_baseline_is_quantized_into_the_candidate(file):
    text = PAIR.replace('candidate = "a"', "").replace(
        '[[steps]]\ncommand = "ppl"',
        '[[steps]]\ncommand = "quantize"\nrecipe = { method = "rtn" }\n[[steps]]\ncommand = "ppl"',
    )
    evaluation = load_experiment(file(text))
    assert evaluation.quantization.recipe.method == "rtn"
    with pytest.raises(UsageError, match="A recipe has no 'group'"):
        load_experiment(file(text.replace('method = "rtn"', "group = 3")))
    with pytest.raises(UsageError, match="no experiment") as found:
        load_experiment(file(text.replace('baseline = "demo"', "")))
    assert "no baseline to quantize" in str(found.value)
