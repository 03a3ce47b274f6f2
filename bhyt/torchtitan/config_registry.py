"""torchtitan's launcher looks here for `--module bhyt.torchtitan --config NAME`: NAME is any config function of its
Llama 3 and Qwen3, whose config is converted with the defaults of `bhyt.torchtitan.convert`."""

import functools
import importlib
import inspect
from typing import Any, Callable, Dict, List

from bhyt.torchtitan.conversion import convert

_MODELS = ("llama3", "qwen3")


@functools.cache
def _functions() -> Dict[str, Callable[[], Any]]:
    registries = [importlib.import_module(f"torchtitan.models.{model}.config_registry") for model in _MODELS]
    return {
        name: function
        for registry in registries
        for name, function in vars(registry).items()
        if inspect.isfunction(function) and function.__module__ == registry.__name__ and not name.startswith("_")
    }


def __getattr__(name: str) -> Callable[[], Any]:
    function = _functions().get(name) if not name.startswith("_") else None
    if function is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    @functools.wraps(function)
    def converted() -> Any:
        return convert(function())

    return converted


def __dir__() -> List[str]:
    return sorted(_functions())
