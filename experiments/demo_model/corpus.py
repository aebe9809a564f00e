"""Training text for the built-in model: what Python packages say about themselves.

A document is one module. For every package it holds the module's documentation strings
(modules, classes, functions, and the strings handed to `add_newdoc` and its kin), dedented and
joined by a blank line; for the standard library there is a second document a module, its source.

Two things never enter it:
- a text already seen (exact duplicates are common: wrappers, templates, vendored copies);
- a text that shares with `pydoc_data.topics`, the built-in evaluation corpus, either a line of
  50 characters or more, or a run of 12 words however it is wrapped. The topics of every
  interpreter named by --topics are checked beside those of the interpreter that runs this.

    python experiments/demo_model/corpus.py OUT.xz OUT.json --topics python3.12 --topics python3.13

OUT.xz holds UTF-8 documents separated by NUL bytes; OUT.json says what went into it.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

PACKAGES = [
    *("numpy", "pandas", "scipy", "matplotlib", "torch", "transformers"),
    *("datasets", "pyarrow", "networkx", "sympy", "pydantic"),
]
# Tests are code about code; `encodings` is tables of code points; `pydoc_data` is the evaluation.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
DOC_SETTERS = {"add_newdoc", "add_docstr", "add_docstr_all"}
SHORTEST = 20  # characters; "Return x." teaches nothing
LEAK_LINE, LEAK_WORDS = 50, 12
PRINT_TOPICS = "import json, pydoc_data.topics as t; print(json.dumps(t.topics))"


@dataclass
class Source:
    """What one package gave, and what was turned away."""

    version: str
    licence: str
    documents: int = 0
    bytes: int = 0
    dropped_as_duplicate: int = 0
    dropped_for_shared_line: int = 0
    dropped_for_shared_words: int = 0


@dataclass
class Leaks:
    """Lines and word runs of the evaluation corpus, against which every text is held."""

    lines: set[str] = field(default_factory=set)
    runs: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, text: str) -> None:
        self.lines |= long_lines(text)
        self.runs |= word_runs(text)


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LEAK_LINE}


def word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(LEAK_WORDS)), strict=False))


def topics_of(interpreter: str) -> str:
    """The topics text of another interpreter, asked of it in isolated mode."""
    answer = subprocess.run(
        [interpreter, "-I", "-c", PRINT_TOPICS], check=True, capture_output=True, text=True
    )
    topics = json.loads(answer.stdout)
    return "\n\n".join(topics[name] for name in sorted(topics))


def modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if found := ast.get_docstring(node):
                yield found
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in DOC_SETTERS:
                for leaf in ast.walk(node):
                    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                        yield textwrap.dedent(leaf.value).strip()


class Collector:
    """Keeps a text once, and only if the evaluation corpus does not share it."""

    def __init__(self, leaks: Leaks) -> None:
        self.leaks = leaks
        self.seen: set[str] = set()
        self.documents: list[str] = []

    def accepts(self, text: str, source: Source) -> bool:
        if len(text) < SHORTEST or "\0" in text:
            return False
        if text in self.seen:
            source.dropped_as_duplicate += 1
        elif long_lines(text) & self.leaks.lines:
            source.dropped_for_shared_line += 1
        elif word_runs(text) & self.leaks.runs:
            source.dropped_for_shared_words += 1
        else:
            self.seen.add(text)
            return True
        return False

    def keep(self, texts: list[str], source: Source) -> None:
        if kept := [text for text in texts if self.accepts(text, source)]:
            document = "\n\n".join(kept)
            self.documents.append(document)
            source.documents += 1
            source.bytes += len(document.encode())

    def package(self, root: Path, source: Source, code: Source | None = None) -> None:
        for path in modules(root):
            try:
                text = path.read_text("utf-8")
                tree = ast.parse(text)
            except (UnicodeDecodeError, SyntaxError):
                continue  # lib2to3's Python 2 grammar files, templates
            self.keep(list(docstrings(tree)), source)
            if code is not None:
                self.keep([text], code)


def licence_of(package: str) -> str:
    meta = importlib.metadata.metadata(package)
    classifiers = [c for c in meta.get_all("Classifier", []) if c.startswith("License ::")]
    named = meta.get("License-Expression") or "; ".join(c.split(" :: ")[-1] for c in classifiers)
    return named or (meta.get("License") or "not stated").splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--topics", action="append", default=[], metavar="INTERPRETER")
    args = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes

    leaks, topics = Leaks(), {}
    for interpreter in [sys.executable, *args.topics]:
        text = topics_of(interpreter)
        leaks.add(text)
        version = subprocess.run([interpreter, "-V"], check=True, capture_output=True, text=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        topics[version.stdout.split()[1]] = {"bytes": len(text.encode()), "sha256": digest}

    collector = Collector(leaks)
    psf = "PSF-2.0"
    sources = {"python": Source(platform.python_version(), psf)}
    sources["python (source)"] = Source(platform.python_version(), psf)
    stdlib = Path(sysconfig.get_path("stdlib"))
    collector.package(stdlib, sources["python"], code=sources["python (source)"])
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"{package} is not installed here: install it, or take it out of PACKAGES")
        version = importlib.metadata.version(package)
        sources[package] = Source(version, licence_of(package))
        collector.package(Path(spec.origin).parent, sources[package])

    text = "\0".join(collector.documents).encode()
    packed = lzma.compress(text, preset=9)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(packed)
    report = {
        "documents": len(collector.documents),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
        "packed_bytes": len(packed),
        "packed_sha256": hashlib.sha256(packed).hexdigest(),
        "leak_check": {"line_characters": LEAK_LINE, "run_words": LEAK_WORDS, "topics": topics},
        "sources": {name: asdict(source) for name, source in sources.items()},
    }
    args.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
