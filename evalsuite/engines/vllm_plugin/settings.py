"""What is asked of the expert cache, as it travels through vLLM's ``additional_config``."""

from collections.abc import Mapping
from typing import Any, Self, get_args

from pydantic import Field, ValidationError

from evalsuite.core.errors import UsageError
from evalsuite.core.spec import CachePolicy, CacheStore
from evalsuite.core.value import Value

PREFIX = "moe_expert_"
POLICY_NAMES: tuple[str, ...] = get_args(CachePolicy)
STORE_NAMES: tuple[str, ...] = get_args(CacheStore)


class CacheSettings(Value):
    """The keys of ``additional_config`` that belong to the cache.

    Attributes:
        moe_expert_cache_size: experts of each layer on the device.
        moe_expert_cache_policy, moe_expert_store: which experts stay, and where the others are.
    """

    moe_expert_cache_size: int = Field(ge=1)
    moe_expert_cache_policy: CachePolicy = "lru"
    moe_expert_store: CacheStore = "pinned"

    @classmethod
    def read(cls, additional_config: object) -> Self | None:
        """The cache's settings, None where there are none.

        Raises:
            UsageError: a key that begins like ours is unknown, a value is wrong, or the size is missing.
        """
        if not isinstance(additional_config, Mapping):
            return None
        ours: dict[str, Any] = {k: v for k, v in additional_config.items() if str(k).startswith(PREFIX)}
        if not ours:
            return None
        if "moe_expert_cache_size" not in ours:
            raise UsageError(
                f"{', '.join(sorted(ours))} is set, and no expert cache is asked for.",
                todo="give moe_expert_cache_size (on the command line: --moe-expert-cache-size) as well.",
            )
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UsageError(
                f"The expert cache's settings are not understood: {faults}.",
                todo=f"known are {', '.join(sorted(cls.model_fields))}.",
            ) from error
