"""Showing the parameters of a plain torch module to Pyro."""

import pyro
from torch import nn

from pnem.models.errors import ModelError

__all__ = ["register_parameters"]


def register_parameters(name: str, module: nn.Module) -> None:
    """Declares every trainable parameter of `module` as a Pyro param, so that ``pyro.infer.SVI`` trains it.

    Under ``pyro.settings.set(module_local_params=True)`` parameters belong to modules, and nothing is to be declared.

    Raises:
        ModelError: Pyro's global parameter store holds another module's parameter of the same name, which `SVI`
            would silently train in place of this one.
    """
    if pyro.settings.get("module_local_params"):
        return
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            full_name = f"{name}$$${key}"
            if pyro.param(full_name, parameter) is not parameter:
                raise ModelError(
                    f"Pyro's parameter store already holds {full_name!r} of another {type(module).__name__}: call "
                    "pyro.clear_param_store() before using this one, or pyro.settings.set(module_local_params=True)"
                )
