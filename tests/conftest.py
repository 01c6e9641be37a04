from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """Every test draws the same numbers and leaves nothing in Pyro's parameter store or torch's defaults."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def draw(monkeypatch):
    """Makes draws of θ repeatable: once more, the same ones, for 3 images or sequences of 3 components, as changed."""

    def again(change=lambda noise: noise):
        generator = torch.Generator().manual_seed(5)

        def randn_like(like):
            return change(torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)).to(like)

        monkeypatch.setattr(torch, "randn_like", randn_like)

    return again
