"""A claims file drafted from the Markdown tables of a card, for a person to complete.

A cell becomes a claim where its number's unit, its column or its row says which metric it is; every other
cell with a digit stays as a comment. Only what a table says is taken: conditions in the text around it, and
which model a column means, are for the reader of the card to add.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.token import Token

from evalsuite.core.errors import UsageError
from evalsuite.report.claim_metrics import BYTES, METRICS
from evalsuite.report.claims import QUOTE_LIMIT

NUMBER = re.compile(
    r"(?P<about>[~≈]|about |ca\. )?\s*(?P<number>\d{1,3}(?:,\d{3}){1,4}(?:\.\d{1,9})?|\d{1,15}(?:\.\d{1,9})?)"
    r"(?![\d,.]*\d)"
    r"\s*(?P<unit>tok/s|tokens/s|TB|GiB|GB|MiB|MB|min\b|s\b|[x×](?!\w)|%|B\b|M\b)?",
    re.IGNORECASE | re.ASCII,
)
UNITS = {
    "tokens/s": "tok/s",
    "×": "x",
    **{unit.lower(): unit for unit in (*BYTES, "tok/s", "s", "min", "x", "%")},
}
# a word in a column's or row's title, and the metric that it means; the first that is there counts
TITLES = (
    (r"\b(ppl|perplexity)\b", "perplexity"),
    (r"\b(tok/s|tokens/s|speed|throughput)\b", "speed"),
    (r"\bvram\b", "vram"),
    (r"\b(download|size|checkpoint)\b", "download"),
    (r"\bload", "load"),
    (r"\bdisk\b", "disk"),
    (r"\bactive\b", "active_parameters"),
    (r"\bparameters\b", "parameters"),
    (r"\blayers\b", "layers"),
    (r"\btokens\b", "scored_tokens"),
    (r"\bwindows\b", "windows"),
)
WEIGHTS = {"b": "billion", "m": "million"}
# a line without a bar after a row: a card copied out of a page has lost the blank line that ends a table
ROW_THEN_TEXT = re.compile(r"^(.*\|[ \t]*\n)(?=[^|\n]+$)", re.MULTILINE)
WHERE_LIMIT = 40
GPU = re.compile(r"\b(RTX (?:PRO )?\w*\d\w*|[AHBL]\d{2,3}S?|MI\d{3}X?)\b")
CACHE = re.compile(r"--moe-expert-cache-size[ =](\d{1,6})\b", re.ASCII)


@dataclass(frozen=True)
class Draft:
    """The text of the file, and how much of the card is in it."""

    text: str
    claims: int
    left: int


@dataclass
class _Lines:
    """The file as it grows."""

    models: dict[str, str]
    claims: list[str] = field(default_factory=list[str])
    ids: set[str] = field(default_factory=set[str])
    left: int = 0

    def free_id(self, *words: str) -> str:
        stem = "-".join(filter(None, map(slug, words)))[:40].strip("-") or "claim"
        name, number = stem, 2
        while name in self.ids:
            name, number = f"{stem}-{number}", number + 1
        self.ids.add(name)
        return name


@dataclass(frozen=True)
class _Table:
    where: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Cell:
    table: _Table
    label: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.table.where}: row “{self.label}”, column “{self.title}”"

    @property
    def metric(self) -> str | None:
        return _metric(self.title, self.table.head[0]) or _metric(self.label, "")

    @property
    def subject(self) -> str:
        """The row where the column says the metric, else the column; empty where that is no name."""
        if NUMBER.fullmatch(self.label.strip()):
            return ""
        if _metric(self.title, "") is not None:
            return self.label
        return "" if self.title.lower() in ("value", "result", "") else self.title


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def draft(card: str, name: str) -> Draft:
    """A claims file for the tables of `card`, whose file is called `name`.

    Raises:
        UsageError: no table of it holds a number that could be a claim.
    """
    title, tables = _tables(MarkdownIt("commonmark").enable("table").parse(ROW_THEN_TEXT.sub(r"\1\n", card)))
    lines = _Lines({"model": title or name})
    for table in tables:
        _take(table, lines)
    taken = sum(line == "[[claim]]" for line in lines.claims)
    if not taken:
        raise UsageError(
            f"{name} has no table with a number that could be a claim.",
            cause="only Markdown tables are read, and a number needs a unit or a title that says what it is.",
            todo="write the claims by hand: experiments/claims/qwopus_35b_a3b.toml shows every key.",
        )
    head = [
        f"# Drafted from {_comment(name)}. Every row or column that may be a model of its own is one:",
        "# join those that are not, add the conditions that the text gives, and make claims of the comments.",
        "",
        "[card]",
        f"title = {_text(title or name)}",
        f"source = {_text(name)}",
    ]
    for key, model in lines.models.items():
        head += ["", f"[models.{json.dumps(key)}]", f"title = {_text(model)}", "names = []  # its hub id"]
    return Draft("\n".join((*head, *lines.claims)) + "\n", taken, lines.left)


def _tables(tokens: Sequence[Token]) -> tuple[str, list[_Table]]:
    """The card's first heading, and every table under its own; without headings, under the line before it."""
    title, heading, before = "", "", ""
    found: list[_Table] = []
    rows: list[list[str]] = []
    inside = ""
    for token in tokens:
        match token.type:
            case "heading_open" | "th_open" | "td_open" | "paragraph_open":
                inside = token.type
            case "tr_open":
                rows.append([])
            case "inline":
                text = _words(token)
                if inside == "heading_open":
                    title, heading = title or text, text
                elif inside == "paragraph_open":
                    before = (token.content.splitlines() or [""])[-1]  # a lone U+00A0 is a paragraph
                elif rows:
                    rows[-1].append(text)
            case "table_close":
                where = heading or before or "table"
                short = where if len(where) <= WHERE_LIMIT else where[: WHERE_LIMIT - 1] + "…"
                found.append(_Table(short, rows[0], rows[1:]))
                rows = []
            case _:
                pass
    return title, found


def _words(token: Token) -> str:
    """Text and code of a cell or heading, without markup."""
    children = token.children or []
    shown = (" " if c.type in ("softbreak", "hardbreak") else c.content for c in children)
    return " ".join("".join(shown).split())


def _take(table: _Table, lines: _Lines) -> None:
    for row in table.rows:
        label = row[0] if row else ""
        conditions = dict(_conditions(table, row))
        for title, cell in zip(table.head[1:], row[1:], strict=False):
            _take_cell(_Cell(table, label, title, cell), conditions, lines)


def _conditions(table: _Table, row: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What the row itself says: a cache size, a GPU, and windows where its label counts them."""
    text = " ".join(row)
    if (found := CACHE.search(text)) and int(found[1]):
        yield "cache", _digits(found[1])
    if found := GPU.search(text):
        yield "gpu", _text(found[1])
    number = NUMBER.fullmatch(row[0].strip()) if row else None
    if number and re.search(r"\bwindows\b", table.head[0], re.IGNORECASE):
        windows = float(number["number"].replace(",", ""))
        if windows.is_integer() and windows > 0:
            yield "windows", f"{windows:.0f}"


def _take_cell(cell: _Cell, conditions: dict[str, str], lines: _Lines) -> None:
    metric, text = cell.metric, cell.text
    number = NUMBER.match(text)
    if number is None:
        words = "—" if text in ("-", "–") else text
        if metric is not None and words not in ("", "baseline"):
            _write(cell, metric, {"words": _text(words[:QUOTE_LIMIT])}, conditions, lines)
        return
    metric, unit = _unit(metric, (number["unit"] or "").lower(), f"{cell.title} {cell.label}")
    if metric is None or unit is None:
        lines.claims += ["", f"# not understood: {_comment(f'{cell.place}: {text}')}"]
        if unit == "x":
            lines.claims.append(
                '# a ratio names its two claims: metric = "ratio", of = ["…", "…"], unit = "x"'
            )
        lines.left += 1
        return
    keys = {"value": _digits(number["number"])}
    if unit:
        keys["unit"] = _text(unit)
    if number["about"]:
        keys["approximate"] = "true"
    _write(cell, metric, keys, conditions, lines)


def _metric(title: str, first: str) -> str | None:
    """What a column or row is about, by its title; memory in a table of GPUs is the GPUs' own."""
    for pattern, metric in TITLES:
        if re.search(pattern, title, re.IGNORECASE):
            return (
                "gpu_memory" if metric == "vram" and re.search(r"\bgpu\b", first, re.IGNORECASE) else metric
            )
    return None


def _unit(metric: str | None, unit: str, title: str) -> tuple[str | None, str | None]:
    """Metric and unit that fit one another; None where they do not."""
    if unit == "tok/s" or UNITS.get(unit) == "tok/s":
        return "speed", "tok/s"
    if unit in WEIGHTS:
        return metric, WEIGHTS[unit] if metric in ("parameters", "active_parameters") else None
    found = UNITS.get(unit, unit)
    if metric is None:
        return None, found
    units = METRICS[metric].units
    if not unit and len(units) == 1:
        return metric, next(iter(units))
    if not unit:
        named = next((name for name in units if re.search(rf"\b{name}\b", title)), None)
        return metric, named
    return metric, found if found in units else None


def _write(cell: _Cell, metric: str, keys: dict[str, str], conditions: dict[str, str], lines: _Lines) -> None:
    model = "model"
    if "gpu" not in conditions and (name := cell.subject):
        model = slug(name) or model
        lines.models.setdefault(model, name)
    kept = {key: value for key, value in conditions.items() if key != metric}
    lines.claims += [
        "",
        f"# {_comment(cell.place)}",
        "[[claim]]",
        f"id = {_text(lines.free_id(cell.label, cell.title))}",
        f"where = {_text(cell.table.where)}",
        f"quote = {_text(cell.text[:QUOTE_LIMIT])}",
        f"model = {_text(model)}",
        f"metric = {_text(metric)}",
        *(f"{key} = {value}" for key, value in (keys | kept).items()),
    ]


def _digits(number: str) -> str:
    """A number as TOML writes it: without commas and leading zeros."""
    whole, point, decimals = number.replace(",", "").partition(".")
    return f"{int(whole)}{point}{decimals}"


def _text(words: str) -> str:
    """A TOML basic string."""
    return json.dumps(words, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(words: str) -> str:
    """One line, without the control characters that TOML forbids in comments."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", words)
