"""Text as it stands, written so that Markdown or LaTeX takes nothing in it for markup."""

import re

# what Markdown would take for markup; underscores inside words, brackets and "p < 0.001" are none
_MARKDOWN = re.compile(r"[\\|*`]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])\(")

# LaTeX's own characters, and those beyond ASCII that tables here use, for engines that know ASCII alone
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "[": "{[}",  # after a line end a bracket would be an argument
        "]": "{]}",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "→": r"$\rightarrow$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "·": r"$\cdot$",
        "≈": r"$\approx$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "−": "$-$",
        "Δ": r"$\Delta$",
        "Σ": r"$\Sigma$",
        "‖": r"$\Vert$",
        "Ŵ": r"$\hat{\mathrm{W}}$",
        "⁰": "$^0$",
        "⁹": "$^9$",
        "²": "$^2$",
        "½": r"$\frac{1}{2}$",
        "—": "---",
        "–": "--",
        "…": r"\ldots{}",
        "\N{NO-BREAK SPACE}": "~",
    }
)


def markdown_text(text: str) -> str:
    """One line of Markdown, for a table's cell or a sentence."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.splitlines()))


def latex_text(text: str) -> str:
    """One line of LaTeX."""
    return " ".join(text.splitlines()).translate(_LATEX)
