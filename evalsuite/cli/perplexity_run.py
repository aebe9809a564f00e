"""What `ppl` does once its flags are a spec: the run, its tables, its picture and the comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalsuite.cli.show import Screen
from evalsuite.cluster.connect import ClusterChoice
from evalsuite.cluster.perplexity import run_perplexity_on
from evalsuite.core.errors import NotComparable, UsageError
from evalsuite.core.record import CompareResult, PerplexityResult, Record
from evalsuite.core.spans import running_perplexity
from evalsuite.core.spec import PerplexitySpec
from evalsuite.data.models import find_checkpoint
from evalsuite.report.perplexity import compare_table, prefix_table, segment_table, summary_table
from evalsuite.report.plots import convergence
from evalsuite.run.perplexity import Finished, run_compare, run_perplexity
from evalsuite.run.resume import finished_comparison, finished_scores, has_states
from evalsuite.store.runs import ResumeMode, RunStore, load_record, load_windows

HOW_TO_RUN_THE_CARD = (
    "This is the built-in model on the built-in text. To score a model of your own on WikiText-2 under the "
    "same protocol: hlwq-eval ppl MODEL"
)


def measure(
    screen: Screen,
    spec: PerplexitySpec,
    results: Path,
    *,
    baseline: str | None,
    inherit: list[str],
    mode: ResumeMode,
    again: bool = True,
    cluster: ClusterChoice | None = None,
) -> None:
    """Run, show and, with a baseline, compare.

    Args:
        baseline: a model, which is scored first under the same protocol, or a finished run, whose text and
            protocol are taken over.
        inherit: fields of the spec that the user left open.
        again: also where finished runs of these specs are there; else those are shown.
        cluster: whose workers score; None scores here.
    """
    store = RunStore(results)
    base: Finished | None = None
    there = Found() if again else _find(store, spec, baseline)
    if baseline is not None:
        if store.is_run(baseline):
            path = store.find(baseline)
            base = Finished(path, load_record(path))
            spec = _take_over(spec, base.record, inherit)
            _refuse_unlike(spec, base.record)
        else:
            role = "baseline"
            base = _run(
                screen,
                store,
                spec.model_copy(update={"model": baseline}),
                mode,
                role,
                there.baseline,
                cluster,
            )
    candidate = _run(screen, store, spec, mode, "candidate" if base else "", there.candidate, cluster)
    compared = there.compared
    if base is not None and compared is None:
        with screen.progress() as progress:
            compared = run_compare(base.path, candidate.path, store, progress, spec.device)
    if compared is not None:
        assert isinstance(compared.record.results, CompareResult)
        screen.table(compare_table(compared.record.results))
    _picture(screen, candidate, base)
    if spec.model == "demo" and base is None:
        screen.note(HOW_TO_RUN_THE_CARD)
    screen.document(_document(candidate, compared))


@dataclass(frozen=True)
class Found:
    """Finished runs that need not be made again."""

    baseline: Finished | None = None
    candidate: Finished | None = None
    compared: Finished | None = None


def _find(store: RunStore, spec: PerplexitySpec, baseline: str | None) -> Found:
    """A pair that was compared, or else runs that kept what a comparison needs."""
    mine = _finished(store, spec)
    if baseline is None:
        return Found(candidate=next(iter(mine), None))
    theirs = _finished(store, spec.model_copy(update={"model": baseline}))
    for base in theirs:
        for candidate in mine:
            if compared := finished_comparison(store, base, candidate):
                return Found(base, candidate, compared)
    return Found(next(filter(has_states, theirs), None), next(filter(has_states, mine), None))


def _finished(store: RunStore, spec: PerplexitySpec) -> list[Finished]:
    return list(finished_scores(store, spec, find_checkpoint(spec.model)))


def _run(
    screen: Screen,
    store: RunStore,
    spec: PerplexitySpec,
    mode: ResumeMode,
    role: str,
    found: Finished | None,
    cluster: ClusterChoice | None,
) -> Finished:
    if role:
        screen.note(f"{role}: {spec.model}")
    if found is not None:
        screen.note("scored before")
        finished = found
    else:
        with screen.progress() as progress:
            if cluster is None:
                finished = run_perplexity(spec, store, progress, mode)
            else:
                finished = run_perplexity_on(cluster, spec, store, progress, mode)
    result = finished.record.results
    assert isinstance(result, PerplexityResult)
    for warning in finished.record.warnings:
        screen.warn(warning)
    screen.table(summary_table(finished.record, result))
    if len(result.prefixes) > 1:
        screen.table(prefix_table(result))
        screen.table(segment_table(result))
    screen.note(f"record: {finished.path}")
    return finished


def _take_over(spec: PerplexitySpec, baseline: Record, inherit: list[str]) -> PerplexitySpec:
    """What the user left open comes from the baseline's own spec."""
    if baseline.kind != "ppl":
        raise UsageError(f"{baseline.run_id} is no perplexity run.", todo="give a run of `hlwq-eval ppl`.")
    theirs = PerplexitySpec.model_validate(baseline.spec)
    return spec.model_copy(update={key: getattr(theirs, key) for key in inherit})


def _refuse_unlike(spec: PerplexitySpec, baseline: Record) -> None:
    """What the comparison would refuse after hours of scoring, as far as flags tell."""
    result = baseline.results
    assert isinstance(result, PerplexityResult)
    theirs = PerplexitySpec.model_validate(baseline.spec)
    different: list[str] = []
    if spec.protocol.model_dump(exclude={"name"}) != theirs.protocol.model_dump(exclude={"name"}):
        different.append(f"protocol: {theirs.protocol.describe()} against {spec.protocol.describe()}")
    elif min(spec.limit or result.windows_available, result.windows_available) != result.windows:
        different.append(f"windows: {result.windows:,} against {spec.limit or result.windows_available:,}")
    if different:
        raise NotComparable(
            f"{spec.model} cannot be compared with {baseline.run_id}.",
            cause="they would differ in " + "; ".join(different) + ".",
            todo="leave out --protocol, --context, --stride and --limit to take over the baseline's.",
        )


def _picture(screen: Screen, candidate: Finished, baseline: Finished | None) -> None:
    runs = [run for run in (candidate, baseline) if run is not None]
    alike = len({_label(run.record) for run in runs}) < len(runs)
    curves: dict[str, Any] = {
        _label(run.record) + (f", {run.path.name}" if alike else ""): running_perplexity(
            load_windows(run.path)
        )
        for run in runs
    }
    record = candidate.record
    assert record.text is not None
    assert record.protocol is not None
    paths = convergence(
        curves,
        f"Perplexity on {record.text.corpus}",
        f"{record.protocol.describe()}. Bands: 95 % interval over windows; they hold the text's variation, "
        "which both models share." if baseline else
        f"{record.protocol.describe()}. Band: 95 % interval over windows.",
        candidate.path / "convergence",
    )  # fmt: skip
    screen.note(f"picture: {paths[0]} (and {paths[1].suffix[1:]})")


def _label(record: Record) -> str:
    assert record.model is not None
    return f"{record.model.name}, {record.model.stored}, {record.model.computed}"


def _document(candidate: Finished, compared: Finished | None) -> dict[str, Any]:
    document: dict[str, Any] = {"path": str(candidate.path), **candidate.record.model_dump(mode="json")}
    if compared is not None:
        document["comparison"] = compared.record.model_dump(mode="json")
    return document
