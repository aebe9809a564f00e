"""A model card made from records: nothing in it was typed, and what was not measured is said to be so."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from evalsuite.core.errors import UsageError
from evalsuite.core.record import CompareResult, QuantizeResult, Record
from evalsuite.data.models import is_hub_id
from evalsuite.report.card_metadata import card_data
from evalsuite.report.choose import newest
from evalsuite.report.commands import commands
from evalsuite.report.gallery import Gallery
from evalsuite.report.markup import markdown_text
from evalsuite.report.quick_start import quick_start
from evalsuite.report.sections import Report, load_folders
from evalsuite.report.subjects import sections
from evalsuite.report.writers import section_markdown

LEFT_OUT = ("flags", "provenance")  # sections of a report that are no reader's of a card
DUMMY = "dummy"
AGAIN = (
    "Each line makes runs of this card again. `compare` names two runs of these records; for new ones, give "
    "their ids, or score the candidate with `--baseline`."
)


@dataclass(frozen=True)
class CardRequest:
    """What a card is of.

    Attributes:
        folders: with records.
        model: its name in the records; None where they are of one alone.
        licence, base_model: for the front matter; the base model also where it is no hub id is named in the
            text by the records' own comparisons.
    """

    folders: tuple[Path, ...]
    model: str | None = None
    licence: str | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Card:
    """A card, and the runs of its model that it is made from."""

    model: str
    text: str
    report: Report
    records: tuple[Record, ...]


def make_card(request: CardRequest, figures: Path, picture_folder: str) -> Card:
    """The card of one model.

    Args:
        figures: where its pictures are drawn.
        picture_folder: the same, relative to the card.

    Raises:
        UsageError: no run is of this model, or none is named and there are several.
    """
    runs, left_out = load_folders(request.folders)
    found = _candidates([run.record for run in runs])
    model = request.model or _only(found)
    if model not in found:
        raise UsageError(
            f"No run measured {model!r}.", todo=f"choose one of {', '.join(found)}, or measure it first."
        )
    mine = [run.record for run in newest(runs) if _measures(run.record, model)]
    baselines = _baselines(mine, [run.record for run in runs])
    shown = [run for run in runs if _shown(run.record, (model, *baselines))]
    gallery = Gallery(figures)
    made = sections(shown, gallery)
    report = Report(model, request.folders, made, tuple(shown), (*left_out, *gallery.warnings))
    base = request.base_model or next((name for name in baselines if is_hub_id(name)), None)
    metadata = card_data(_title(model), mine, licence=request.licence, base_model=base)
    body = "\n".join(_body(model, mine, report, picture_folder, baselines)).rstrip() + "\n"
    text = f"---\n{_yaml(metadata)}\n---\n\n{body}"
    ModelCard(text)  # refuses front matter that the hub could not read
    return Card(model, text, report, tuple(mine))


def _yaml(metadata: ModelCardData) -> str:
    return metadata.to_yaml()  # pyright: ignore[reportUnknownMemberType]


def absences(records: Sequence[Record]) -> list[str]:
    """What nobody measured of a model, each with the command that would."""
    done = [record for record in records if record.status == "ok"]
    model = next((str(record.spec["model"]) for record in done if "model" in record.spec), "MODEL")
    speeds = [record for record in done if record.kind == "speed"]
    eager = {bool(record.spec["serving"]["enforce_eager"]) for record in speeds}
    compared = [record.results for record in done if isinstance(record.results, CompareResult)]
    checks = (
        (any(r.kind == "ppl" for r in done), "Perplexity", f"hlwq-eval ppl {model}"),
        (bool(compared), "What quantization cost", f"hlwq-eval ppl {model} --baseline BASELINE"),
        (
            not compared or any(result.divergence for result in compared),
            "KL divergence and agreement with the baseline", f"hlwq-eval ppl {model} --baseline BASELINE",
        ),
        (True in eager, "Speed in eager mode", f"hlwq-eval speed {model} --modes eager"),
        (False in eager, "Speed with CUDA graphs", f"hlwq-eval speed {model} --modes graphs"),
        (
            any(r.spec["workload"]["concurrency"] > 1 for r in speeds),
            "Speed of several requests at once", f"hlwq-eval speed {model} --concurrency 1,8",
        ),
        (any(r.machine.gpus for r in speeds), "Speed on a GPU", f"hlwq-eval speed {model}"),
        (
            any(r.kind == "footprint" for r in done),
            "Memory and disk over time", f"hlwq-eval footprint {model}",
        ),
    )  # fmt: skip
    return [f"{what}: `{command}`" for there, what, command in checks if not there]


def _body(
    model: str, records: Sequence[Record], report: Report, pictures: str, baselines: Sequence[str]
) -> list[str]:
    dummy = any(record.spec.get("serving", {}).get("load_format") == DUMMY for record in records)
    against = f", held against {', '.join(map(markdown_text, baselines))}" if baselines else ""
    lines = [
        f"# {markdown_text(_title(model))}",
        "",
        f"Measured by hlwq-eval{against}. Every number comes from a record; ± and brackets are 95 % "
        "intervals. A dash was not measured, and what is derived says so.",
        "",
    ]
    if dummy:
        lines += [
            "**Random weights in the model's shape: speed and memory only, and nothing of quality.**",
            "",
        ]
    for warning in report.warnings:
        lines += [f"- **Note:** {markdown_text(warning)}", ""]
    if start := quick_start(records):
        lines += [
            "## Quick start",
            "",
            "```sh",
            *start.commands,
            "```",
            "",
            markdown_text(start.statement),
            "",
        ]
    for section in report.sections:
        if section.anchor not in LEFT_OUT:
            lines += section_markdown(section, pictures, "png")
    lines += ["## Measure it again", "", AGAIN, ""]
    lines += ["```sh", *commands(report.records), "```", ""]
    lines += ["## Limits", "", *(f"- {sentence}" for sentence in _limits(records)), ""]
    if missing := absences(records):
        lines += ["Not measured:", "", *(f"- {line}" for line in missing), ""]
    return lines


def _limits(records: Sequence[Record]) -> list[str]:
    done = [record for record in records if record.status == "ok"]
    texts = dict.fromkeys(r.text.corpus for r in done if r.kind == "ppl" and r.text is not None)
    devices = dict.fromkeys(
        r.model.device_name for r in done if r.kind in ("speed", "footprint") and r.model is not None
    )
    found: list[str] = []
    if texts:
        found.append(
            f"Perplexity is of {', '.join(map(markdown_text, texts))} alone: it says nothing of other texts, "
            "of instructions followed or of facts known. Perplexities of two tokenizers are not comparable."
        )
    if devices:
        found.append(f"Speed and memory are of {', '.join(map(markdown_text, devices))}; others differ.")
    warnings = dict.fromkeys(warning for record in done for warning in record.warnings)
    return [*found, *(f"{markdown_text(w[0].upper() + w[1:].rstrip('.'))}." for w in warnings)]


def _candidates(records: Sequence[Record]) -> list[str]:
    """Models that were measured, those that were compared with a baseline first."""
    compared = [_name(r) for r in records if r.kind == "compare"]
    measured = [_name(r) for r in records if r.kind in ("ppl", "speed", "footprint")]
    return list(dict.fromkeys(name for name in (*compared, *measured) if name))


def _measures(record: Record, model: str) -> bool:
    return record.kind != "quantize" and _name(record) == model


def _shown(record: Record, models: Sequence[str]) -> bool:
    """Whether a run is of one of these models; of the quantizations, those that made one."""
    if isinstance(record.results, QuantizeResult):
        return record.results.destination in models
    return _name(record) in models


def _name(record: Record) -> str:
    return record.model.name if record.model else record.run_id.partition("/")[0]


def _only(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UsageError(f"The records are of {len(names)} models.", todo=f"name one: {', '.join(names)}.")
    return names[0]


def _baselines(mine: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Models that this one was compared with."""
    by_id = {record.run_id: record for record in records}
    runs = (r.results.baseline_run for r in mine if isinstance(r.results, CompareResult))
    return list(dict.fromkeys(_name(by_id[run]) for run in runs if run in by_id))


def _title(model: str) -> str:
    """A folder's name without the digest that this suite appends; a hub id without its owner."""
    return re.sub(r"-[0-9a-f]{8}$", "", model.rpartition("/")[2])
