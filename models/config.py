"""Parts that remember how they were built, so that a run can be described in JSON and built again."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pnem.models.errors import ModelError

__all__ = ["Configured", "build", "completed", "describe"]

_CLASSES: dict[str, type["Configured"]] = {}


class Configured:
    """Base of models, decoders, likelihoods, encoders, strategies and objectives: keeps its constructor's arguments.

    Every subclass is known by its module and name, so that `build` only ever calls classes which the program
    has already imported: a description read from a file cannot run code from it.
    """

    config: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[_type_name(cls)] = cls
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def describe(part: Any) -> Any:
    """A JSON-compatible description of a part and of the parts it was built from; numbers and strings stay as they are.

    Raises:
        ModelError: an argument of the part is neither a `Configured` part nor plain data.

    >>> from pnem.models import Bernoulli
    >>> describe(Bernoulli())
    {'type': 'pnem.models.likelihoods.Bernoulli'}
    """
    if isinstance(part, Configured):
        return {"type": _type_name(type(part))} | {name: describe(value) for name, value in part.config.items()}
    if isinstance(part, (list, tuple)):
        return [describe(item) for item in part]
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    raise ModelError(
        f"cannot describe {part!r} of type {type(part).__name__} in a run's settings: "
        "build models and strategies from pnem's parts (or subclasses of pnem.models.Configured) and plain numbers"
    )


def build(description: Mapping[str, Any], model: Any = None) -> Any:
    """The part that `describe` described; parts that work on a model are given `model`, however deep they lie.

    Raises:
        ModelError: the description names no type, an unknown one, or arguments that the type does not take.
    """
    name = description.get("type")
    if name not in _CLASSES:
        raise ModelError(
            f"unknown part {name!r}: import the module that defines it first; known are {sorted(_CLASSES)}"
        )
    arguments = {key: _build_argument(value, model) for key, value in description.items() if key != "type"}
    takes_model = model is not None and "model" in inspect.signature(_CLASSES[name]).parameters
    try:
        return _CLASSES[name](*([model] if takes_model else []), **arguments)
    except TypeError as error:
        raise ModelError(f"{name} does not take the described arguments {sorted(arguments)}: {error}") from error


def completed(description: Any) -> Any:
    """A description with the defaults of arguments that it lacks, as one by an older version does.

    >>> completed({"type": "pnem.models.decoders.Linear", "latent_features": 5, "image_shape": [2, 2, 1]})["bias"]
    True
    """
    if isinstance(description, list):
        return [completed(item) for item in description]
    if not isinstance(description, Mapping) or description.get("type") not in _CLASSES:
        return description
    parameters = inspect.signature(_CLASSES[description["type"]]).parameters.values()
    defaults = {p.name: describe(p.default) for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | {name: completed(value) for name, value in description.items()}


def _build_argument(value: Any, model: Any) -> Any:
    if isinstance(value, Mapping):
        return build(value, model)
    if isinstance(value, list):
        return tuple(_build_argument(item, model) for item in value)
    return value


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: Configured, *args: Any, **kwargs: Any) -> None:
        if "config" not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            # The model is described once, beside the strategy that works on it.
            given = {name: value for name, value in bound.arguments.items() if name not in ("self", "model")}
            object.__setattr__(self, "config", given)
        init(self, *args, **kwargs)

    return wrapper
