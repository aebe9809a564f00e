"""`hlwq-eval ppl --explain`: the window arithmetic, and which protocols fit the counts of a card."""

from dataclasses import dataclass
from pathlib import Path

from evalsuite.cli.show import Screen
from evalsuite.core.protocol import PROTOCOLS, WindowProtocol
from evalsuite.data.corpora import WIKITEXT2_TOKENS, load_corpus
from evalsuite.data.models import DEMO, SMOLLM2, find_checkpoint
from evalsuite.data.tokens import tokenise
from evalsuite.data.windows import Fit, count_windows, fit_protocols, plan_windows
from evalsuite.report.tables import Column, Table


@dataclass(frozen=True)
class TextLength:
    """How many tokens a text has, and by whose count; `raw_tokens` of the rows joined as in the file."""

    tokens: int
    source: str
    raw_tokens: int | None = None

    def under(self, protocol: WindowProtocol) -> int:
        if protocol.join == "raw" and self.raw_tokens is not None:
            return self.raw_tokens
        return self.tokens


@dataclass(frozen=True)
class Arithmetic:
    protocol: WindowProtocol
    length: TextLength
    tokens: int
    windows: int
    scored: int
    dropped: int


def explain_protocols(
    screen: Screen,
    model: str | None,
    tokenizer: str | None,
    corpus: str | None,
    protocol: WindowProtocol,
    windows: int | None,
    scored_tokens: int | None,
) -> None:
    """Print the presets' counts, or the protocols that give the counts asked for."""
    lengths = _lengths(model, tokenizer, corpus)
    if windows is not None and scored_tokens is not None:
        fits = [
            (length, fit)
            for length in lengths
            for fit in fit_protocols(windows, scored_tokens, length.tokens)
        ]
        screen.table(fit_table(windows, scored_tokens, lengths, fits))
        screen.document([{"text": x.source, "tokens": x.tokens, "contexts": f.contexts,
                          "protocol": f.protocol.model_dump()} for x, f in fits])  # fmt: skip
        return
    chosen = [protocol, *(p for p in PROTOCOLS.values() if p != protocol)]
    rows = [_arithmetic(p, length) for length in lengths for p in chosen]
    screen.table(arithmetic_table(rows))
    screen.document([{"text": r.length.source, "tokens": r.tokens, "windows": r.windows,
                      "scored_tokens": r.scored, "unscored_tokens": r.dropped,
                      "protocol": r.protocol.model_dump()} for r in rows])  # fmt: skip


def _lengths(model: str | None, tokenizer: str | None, corpus: str | None) -> list[TextLength]:
    if model is None and tokenizer is None and corpus is None:
        return [
            TextLength(count, f"WikiText-2 test, {name} tokenizer")
            for name, count in WIKITEXT2_TOKENS.items()
        ]
    from evalsuite.engines.tokenizer import load_tokenizer
    from evalsuite.run.options import default_corpus

    name = model or DEMO
    on_hub = name not in (DEMO, SMOLLM2) and not Path(name).expanduser().exists()
    if tokenizer or on_hub:  # of a hub model, the tokenizer alone is downloaded
        loaded = load_tokenizer(tokenizer or name, None)
    else:
        loaded = load_tokenizer(None, find_checkpoint(name))
    text = load_corpus(corpus or default_corpus(model or tokenizer, None))
    blank, raw = (len(tokenise(loaded.tokenizer, text.text(join), "never")) for join in ("blank-line", "raw"))
    return [TextLength(blank, f"{text.name}, tokenizer of {loaded.name}", raw)]


def _arithmetic(protocol: WindowProtocol, length: TextLength) -> Arithmetic:
    tokens = length.under(protocol)
    count = count_windows(tokens, protocol)
    scored = sum(w.scored for w in plan_windows(tokens, protocol)) if count else 0
    return Arithmetic(protocol, length, tokens, count, scored, tokens - scored)


def arithmetic_table(rows: list[Arithmetic]) -> Table[Arithmetic]:
    return Table(
        "From tokens to windows",
        (
            Column[Arithmetic]("protocol", lambda r: r.protocol.name),
            Column[Arithmetic]("text", lambda r: r.length.source),
            Column[Arithmetic]("tokens", lambda r: f"{r.tokens:,}"),
            Column[Arithmetic]("context", lambda r: f"{r.protocol.context:,}"),
            Column[Arithmetic]("stride", lambda r: f"{r.protocol.stride:,}"),
            Column[Arithmetic]("windows", lambda r: f"{r.windows:,}"),
            Column[Arithmetic]("scored", lambda r: f"{r.scored:,}"),
            Column[Arithmetic]("never scored", lambda r: f"{r.dropped:,}"),
        ),
        rows,
        "Full windows: ⌊(tokens − context) / stride⌋ + 1. A BOS token that a protocol adds is not counted.",
    )


def fit_table(
    windows: int, scored: int, lengths: list[TextLength], fits: list[tuple[TextLength, Fit]]
) -> Table[tuple[TextLength, Fit]]:
    tried = "; ".join(f"{x.tokens:,} ({x.source})" for x in lengths)
    if fits:
        verdict = "An arithmetic fit is no proof: the counts do not say which of these was used."
    else:
        verdict = "No common protocol gives these counts on such a text: another tokenizer, or another text."
    return Table(
        f"Protocols that give {windows:,} windows and {scored:,} scored tokens",
        (
            Column[tuple[TextLength, Fit]]("protocol", lambda r: r[1].protocol.name),
            Column[tuple[TextLength, Fit]]("text", lambda r: r[0].source),
            Column[tuple[TextLength, Fit]]("stride", lambda r: f"{r[1].protocol.stride:,}"),
            Column[tuple[TextLength, Fit]]("context", lambda r: f"{r[1].protocol.context:,}"),
            Column[tuple[TextLength, Fit]](
                "any context in", lambda r: f"{r[1].contexts[0]:,}–{r[1].contexts[1]:,}"
            ),
        ),
        fits,
        f"Tokens in the text: {tried}. {verdict}",
    )
