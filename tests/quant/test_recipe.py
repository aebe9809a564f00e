import subprocess
import sys

import pytest

from evalsuite.core.errors import UsageError
from evalsuite.quant.recipe import HlwqScheme, Int4Grid, Recipe


@pytest.mark.parametrize(
    ("choices", "scheme", "grid"),
    [
        ({}, HlwqScheme(5), Int4Grid(128)),
        ({"method": "rtn"}, None, Int4Grid(128)),
        ({"method": "rtn", "scale": "mse", "group_size": 32}, None, Int4Grid(32, "mse")),
        ({"method": "rtn", "format": "bf16"}, None, Int4Grid(128)),
        ({"format": "hlwq", "hlwq_bits": 3}, HlwqScheme(3), None),
        (
            {"format": "bf16", "codebook": "absmax", "hadamard": False},
            HlwqScheme(5, 128, "absmax", False),
            None,
        ),
    ],
)
def test_steps(choices, scheme, grid):
    recipe = Recipe(**choices)
    assert (recipe.scheme, recipe.grid) == (scheme, grid)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "gptq"}, "method"),
        ({"format": "gguf"}, "format"),
        ({"hlwq_bits": 7}, "hlwq bits"),
        ({"group_size": 100}, "group size"),
        ({"method": "rtn", "format": "hlwq"}, "Method rtn"),
        ({"method": "rtn", "hlwq_bits": 4}, "no effect"),
        ({"method": "rtn", "hadamard": False}, "no effect"),
        ({"format": "bf16", "scale": "mse"}, "no effect"),
    ],
)
def test_refused(choices, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**choices)


def test_needs_no_torch():
    program = "import sys, evalsuite.quant.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
