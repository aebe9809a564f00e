"""Errors: three sentences and an exit code."""

import inspect

import pytest

from evalsuite.core import errors
from evalsuite.core.errors import EvalError, MeasurementError, UsageError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, EvalError)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_draws_every_error(kind: type[EvalError]):
    assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("kind", KINDS)
def test_exit_codes(kind: type[EvalError]):
    expected = 2 if issubclass(kind, UsageError) else 1
    assert kind("x").exit_code == expected
    assert kind is EvalError or issubclass(kind, UsageError) != issubclass(kind, MeasurementError)


def test_the_text_is_what_why_and_what_next():
    assert (
        str(EvalError("It broke.", cause="rust.", todo="oil it."))
        == "It broke.\nCause: rust.\nNext:  oil it."
    )
    assert str(EvalError("It broke.")) == "It broke."
