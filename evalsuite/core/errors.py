"""Every error that the suite raises on purpose.

    EvalError
    ├── UsageError                 exit 2: the request cannot be carried out as it stands
    │   ├── MissingDependency      a package of an optional extra is not installed
    │   ├── CorpusError            a text cannot be had, or is not what its name says
    │   ├── ModelError             a checkpoint cannot be found, read or used
    │   ├── ResumeMismatch         an unfinished run was made under other conditions
    │   └── NotComparable          two runs differ in more than the axis asked for
    └── MeasurementError           exit 1: the request was sound, the measurement was not
        ├── NonFiniteScore         NaN or infinite log-probabilities
        ├── NotEngaged             a knob was set, and the record shows that it was not on
        ├── OutOfMemory            it does not fit, even at the smallest batch
        ├── TimedOut               it took longer than the limit that was given
        ├── EngineDied             the engine's process ended, or stopped answering
        └── StorageError           a result could not be written or read back

Each carries what happened, the likely cause and the next step; only the command line catches them.
"""


class EvalError(Exception):
    """What happened, why (if known) and what to do next, as three sentences."""

    exit_code = 1

    def __init__(self, what: str, *, cause: str = "", todo: str = "") -> None:
        super().__init__(what)
        self.what, self.cause, self.todo = what, cause, todo

    def __str__(self) -> str:
        lines = [self.what]
        if self.cause:
            lines.append(f"Cause: {self.cause}")
        if self.todo:
            lines.append(f"Next:  {self.todo}")
        return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line; its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class UsageError(EvalError):
    exit_code = 2


class MissingDependency(UsageError):
    pass


class CorpusError(UsageError):
    pass


class ModelError(UsageError):
    pass


class ResumeMismatch(UsageError):
    pass


class NotComparable(UsageError):
    pass


class MeasurementError(EvalError):
    pass


class NonFiniteScore(MeasurementError):
    pass


class NotEngaged(MeasurementError):
    pass


class OutOfMemory(MeasurementError):
    pass


class TimedOut(MeasurementError):
    pass


class EngineDied(MeasurementError):
    pass


class StorageError(MeasurementError):
    pass
