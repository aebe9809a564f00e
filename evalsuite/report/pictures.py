"""The pictures that the runs of a report are enough for."""

from collections.abc import Hashable, Sequence
from pathlib import Path

from evalsuite.core.record import Record
from evalsuite.core.spans import running_perplexity
from evalsuite.core.speed import FootprintResult
from evalsuite.report.apart import names_apart
from evalsuite.report.cache_plots import hit_rates
from evalsuite.report.choose import Lineage, grouped, model_of
from evalsuite.report.footprint import absences, computed_where, vram_numbers
from evalsuite.report.footprint_plots import over_time, vram_bars
from evalsuite.report.gallery import Gallery, Picture
from evalsuite.report.naming import what
from evalsuite.report.perplexity_runs import Pairing, condition_of
from evalsuite.report.plots import COLOURS, convergence, quantization_error
from evalsuite.report.quantization import errors_by_layer, recipe_text
from evalsuite.report.quantizations import result_of as quantized
from evalsuite.report.scatter_plots import Point, memory_speed, paired_windows
from evalsuite.report.speed_cell import Row, mode_pairs, slots
from evalsuite.report.speed_plots import cache_curves, cache_words, mode_bars
from evalsuite.report.vram import engine_numbers
from evalsuite.store.runs import StoredRun, load_windows
from evalsuite.telemetry.samples import load_samples

Pictures = tuple[Picture, ...]


def convergence_picture(gallery: Gallery, runs: Sequence[StoredRun], lineage: Lineage) -> Pictures:
    """Perplexity along the text, of runs of one condition: of many, baselines and the lowest.

    Args:
        runs: in the order of their perplexity.
    """
    chosen, records = list(runs), [run.record for run in runs]
    if len(runs) > len(COLOURS):
        named = {base.run_id for r in records if (base := lineage.baseline(r, records))}
        chosen = sorted(runs, key=lambda run: run.record.run_id not in named)[: len(COLOURS)]
    caption = (
        "Bands are 95 % intervals over windows. Models scored on one text move together, so overlapping "
        "bands do not make two models equal, and the paired table tells them apart."
    )
    if len(chosen) < len(runs):
        caption = f"{len(chosen)} of {len(runs)} runs: the baseline and the lowest perplexities. {caption}"
    condition, names = condition_of(records[0]), names_apart(records)

    def draw(caption: str, out: Path) -> list[Path]:
        curves = {names[run.record.run_id]: running_perplexity(load_windows(run.path)) for run in chosen}
        return convergence(curves, f"Perplexity along the text: {condition}", caption, out)

    alt = "Perplexity of the first n windows for growing n, with bands, of " + ", ".join(
        names[run.record.run_id] for run in chosen
    )
    return gallery.draw(f"convergence {condition}", alt, caption, draw)


def paired_pictures(gallery: Gallery, rows: Sequence[Pairing], paths: dict[str, Path]) -> Pictures:
    """Windows of a candidate against its baseline, of the pairs that differ least and most.

    Args:
        rows: against one baseline.
        paths: run id to folder.
    """
    there = [p for p in rows if {p.result.candidate_run, p.result.baseline_run} <= paths.keys()]
    ordered = sorted(there, key=lambda p: abs(p.result.delta_ln_ppl))
    found: Pictures = ()
    for row in ordered[:1] + ordered[1:][-1:]:
        result, (candidate, baseline) = row.result, row.names
        interval = "" if result.low is None else f" [{result.low:+.4f}, {result.high:+.4f}]"
        surely = result.low is not None and result.high is not None and not result.low <= 0 <= result.high
        record = row.record
        where = f"{record.text.corpus}, {record.protocol.name}" if record.text and record.protocol else ""
        caption = (
            f"{where}. Mean difference Δ ln PPL {result.delta_ln_ppl:+.4f}{interval}, 95 % interval over "
            "windows: "
            + ("a difference on this text" if surely else "no difference is shown on this text")
            + ". A point is a window; points off the line are noise unless they lean to one side."
        )

        def draw(caption: str, out: Path, row: Pairing = row) -> list[Path]:
            base, mine = (
                load_windows(paths[run]) for run in (row.result.baseline_run, row.result.candidate_run)
            )
            candidate, baseline = row.names
            title = f"{candidate} against {baseline}, window by window"
            return paired_windows(base, mine, (baseline, candidate), title, caption, out)

        found += gallery.draw(
            f"paired {candidate} {baseline}",
            f"Nats per token of each window: {candidate} against {baseline}", caption, draw,
        )  # fmt: skip
    return found


def speed_pictures(gallery: Gallery, rows: Sequence[Row]) -> Pictures:
    """Eager against graphs, and memory against speed, of cells of one platform that succeeded."""
    found: Pictures = ()
    if not rows:
        return found
    where = rows[0].place
    if mode_pairs(rows):
        caption = f"{_ratios(rows)} Means over repeats; lines: bounds by measured bandwidth."
        found += gallery.draw(
            f"modes {where}", f"Decode speed in eager mode and with CUDA graphs on {where}", caption,
            lambda caption, out: mode_bars(rows, caption, out),
        )  # fmt: skip
    least = min(row.spec.workload.concurrency for row in rows)
    alike = [row for row in rows if row.spec.workload.concurrency == least]
    points = [point for row in alike if (point := _point(row, alike))]
    if len({point.memory_bytes for point in points}) > 1:
        caption = (
            "Weights as the engine counts them, without KV cache. Means over repeats with 95 % t-intervals; "
            f"labels are cache sizes; concurrency {least}. Dotted lines join cells that differ in that alone "
            "and predict nothing in between."
        )
        found += gallery.draw(
            f"memory speed {where}", f"Decode speed against weights on the device, {where}", caption,
            lambda caption, out: memory_speed(points, f"Memory and speed on {where}", caption, out),
        )  # fmt: skip
    return found


def _point(row: Row, rows: Sequence[Row]) -> Point | None:
    weights = engine_numbers(row.record).weights_bytes
    if weights is None:
        return None
    speed = row.result.decode_tokens_per_s
    parts = [row.model, row.mode, *cache_words(row, rows)]
    return Point(", ".join(parts), slots(row.spec), weights, speed.mean, speed.low, speed.high)


def _ratios(rows: Sequence[Row]) -> str:
    found = [
        graphs.result.decode_tokens_per_s.mean / eager.result.decode_tokens_per_s.mean
        for eager, graphs in mode_pairs(rows)
    ]
    low, high = f"{min(found):.3g}", f"{max(found):.3g}"
    return f"CUDA graphs are {low if low == high else f'{low} to {high}'}× as fast as eager mode here."


def cache_pictures(gallery: Gallery, rows: Sequence[Row]) -> Pictures:
    """Speed and hit rate against the cache size, of one model's cells that succeeded."""
    model, found = f"{rows[0].model}{rows[0].place.removeprefix(rows[0].device)}", ()
    rows = [row for line in grouped(rows, _line) if len({slots(r.spec) for r in line}) > 1 for row in line]
    if len({row.spec.serving.moe_expert_cache_size for row in rows}) > 1:
        caption = (
            "Means over repeats with 95 % t-intervals; dotted lines are bounds from measured bandwidths and, "
            "with a cache, measured misses."
        )
        found += gallery.draw(
            f"cache speed {model}", f"Decode speed against expert-cache size, {model}", caption,
            lambda caption, out: cache_curves(rows, caption, out),
        )  # fmt: skip
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        counters = row.record.expert_cache
        if counters is not None and counters.hit_rate is not None:
            curves.setdefault(_curve(row, rows), {}).setdefault(counters.size, counters.hit_rate)
    experts = max((row.record.expert_cache.experts for row in rows if row.record.expert_cache), default=0)
    if max((len(by_size) for by_size in curves.values()), default=0) > 1:
        drawn = any(row.spec.serving.moe_routing != "model" for row in rows)
        dummy = any(row.spec.serving.load_format == "dummy" for row in rows)
        caption = "Measured over the decoding steps of a run, all layers together." + (
            " Experts were drawn at random or chosen by random weights: this is no trained model's hit rate."
            if drawn or dummy
            else " The hit rate is that of these prompts."
        )
        found += gallery.draw(
            f"hit rate {model}", f"Hit rate against expert-cache size, {model}", caption,
            lambda caption, out: hit_rates(
                curves, experts, None, f"{model}: measured hit rate of the expert cache", caption, out
            ),
        )  # fmt: skip
    return found


def _line(row: Row) -> Hashable:
    """Equal for cells that one line joins."""
    serving = row.spec.serving
    return (
        row.mode, serving.tensor_parallel_size, row.spec.workload.concurrency, row.routing,
        serving.moe_expert_store, serving.moe_expert_cache_policy,
    )  # fmt: skip


def _curve(row: Row, rows: Sequence[Row]) -> str:
    """What decides a hit rate, beside the size: the policy, and of the others those that vary."""
    cached = [r for r in rows if r.cached]
    words = [row.spec.serving.moe_expert_cache_policy]
    if len({r.routing for r in cached}) > 1:
        words.append(row.routing)
    if len({r.spec.workload.concurrency for r in cached}) > 1:
        words.append(f"concurrency {row.spec.workload.concurrency}")
    return ", ".join(words)


def quantization_pictures(gallery: Gallery, records: Sequence[Record]) -> Pictures:
    """Error by layer of the quantizations of one source that lose least and most."""
    there = [record for record in records if errors_by_layer(quantized(record))]
    ordered = sorted(there, key=lambda record: quantized(record).total.relative_error or 0)
    found: Pictures = ()
    for record in ordered[:1] + ordered[1:][-1:]:
        result, recipe = quantized(record), recipe_text(record.spec["recipe"])
        whole = 100 * (result.total.relative_error or 0)
        caption = (
            f"{recipe}. All quantized weights together: {whole:.2f} %. Counted over every weight, hence no "
            "error bar; it says what the weights lost, not what the model did."
        )

        def draw(caption: str, out: Path, record: Record = record) -> list[Path]:
            result = quantized(record)
            title = f"{result.source}: error of the quantized weights by layer"
            return quantization_error(errors_by_layer(result), title, caption, out)

        found += gallery.draw(
            f"error {result.destination}", f"Relative error of the quantized weights by layer: {recipe}",
            caption, draw,
        )  # fmt: skip
    return found


def memory_pictures(gallery: Gallery, run: StoredRun) -> Pictures:
    """Memory and disk over time, and the four VRAM numbers, of one run."""
    record, name = run.record, model_of(run.record)
    telemetry = record.telemetry
    assert telemetry is not None
    where = computed_where(record)

    def draw(caption: str, out: Path) -> list[Path]:
        title = f"{name}: memory and disk over time\n{what(record)}"
        return over_time(load_samples(run.path), telemetry, title, caption, out)

    found = gallery.draw(
        f"over time {name} {what(record)}", f"Memory and disk over time with phases, {name}, {what(record)}",
        " ".join((f"{where}. One run. GB = 10⁹ bytes.", *absences(telemetry))), draw,
    )  # fmt: skip
    result = record.results
    stored = result.checkpoint_bytes if isinstance(result, FootprintResult) else 0
    stored = stored or (record.model.stored_bytes if record.model else 0)
    return found + gallery.draw(
        f"vram {name} {what(record)}", f"Four numbers that are called VRAM, {name}, {what(record)}",
        f"{where}. One run: each number by who counts it. Only the weights are the model's own need; the KV "
        "budget is what the engine chose to reserve.",
        lambda caption, out: vram_bars(
            vram_numbers(record), stored or None,
            f"{name}: four numbers that are called VRAM\n{what(record)}", caption, out,
        ),
    )  # fmt: skip
