"""vLLM's arguments with three more: how a flag becomes a key of ``additional_config``, and a key a worker."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from functools import wraps
from typing import Any

from evalsuite.engines.vllm_plugin.settings import POLICY_NAMES, STORE_NAMES, CacheSettings

logger = logging.getLogger("vllm.hlwq_expert_cache")


def extend_arguments() -> None:
    """Wrap the functions of vLLM's `EngineArgs` that read the command line and make the configuration."""
    arg_utils: Any = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:  # a worker: its configuration is made already
        return
    engine_args = arg_utils.EngineArgs
    if getattr(engine_args, "_hlwq_expert_cache", False):
        return
    engine_args._hlwq_expert_cache = True
    add_cli_args, from_cli_args = engine_args.add_cli_args, engine_args.from_cli_args
    create_engine_config = engine_args.create_engine_config

    @wraps(add_cli_args)
    def add_ours(parser: ArgumentParser) -> ArgumentParser:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @wraps(from_cli_args.__func__)
    def read_ours(cls: Any, args: Namespace) -> Any:
        return from_cli_args.__func__(cls, move_flags(args))

    @wraps(create_engine_config)
    def configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = CacheSettings.read(self.additional_config)
        if settings is None:
            return create_engine_config(self, *args, **kwargs)
        from evalsuite.engines.vllm_plugin.refusals import prepare_arguments, prepare_configuration

        prepare_arguments(self)
        config = create_engine_config(self, *args, **kwargs)
        prepare_configuration(config, settings)
        return config

    engine_args.add_cli_args = staticmethod(add_ours)
    engine_args.from_cli_args = classmethod(read_ours)
    engine_args.create_engine_config = configure


def add_flags(parser: ArgumentParser) -> None:
    """Add the cache's three flags to a parser of vLLM's."""
    group = parser.add_argument_group(
        title="Expert cache",
        description="Keep only some of a mixture-of-experts model's experts on the device.",
    )
    group.add_argument(
        "--moe-expert-cache-size", type=int, default=None, metavar="N",
        help="Experts of each layer on the device; the others wait in the store. Default: all of them.",
    )  # fmt: skip
    group.add_argument(
        "--moe-expert-cache-policy", choices=POLICY_NAMES, default=None,
        help="Which experts stay on the device. Default: lru.",
    )  # fmt: skip
    group.add_argument(
        "--moe-expert-store", choices=STORE_NAMES, default=None,
        help="Where the other experts are: in pinned host memory, or in files. Default: pinned.",
    )  # fmt: skip


def move_flags(args: Namespace) -> Namespace:
    """The same arguments, the cache's flags as keys of ``additional_config``; a flag wins over a key."""
    given = {k: v for k in CacheSettings.model_fields if (v := getattr(args, k, None)) is not None}
    if not given:
        return args
    moved = dict(getattr(args, "additional_config", None) or {}) | given
    return Namespace(**vars(args) | {"additional_config": moved})
