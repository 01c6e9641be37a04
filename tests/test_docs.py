"""Every example in a docstring gives what it says."""

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

PACKAGES = ("pnem", "pnem.inference", "pnem.models")
MODULES = {
    module.name
    for package in map(import_module, PACKAGES)
    for module in walk_packages(package.__path__, f"{package.__name__}.")
}


@pytest.mark.parametrize("name", sorted(MODULES.union(PACKAGES)))
def test_examples(name: str) -> None:
    assert doctest.testmod(import_module(name)).failed == 0
