"""The base of every record and spec."""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
