"""Ready-made (model, strategy, objective) triples with the settings to train them."""

from pnem.errors import RunError, StrategyError
from pnem.recipe import Parts, Preset
from pnem.sequence_presets import SEQUENCE_PRESETS
from pnem.static_presets import STATIC_PRESETS

__all__ = ["PRESETS", "STRATEGIES", "Parts", "Preset", "find_preset"]

PRESETS: dict[str, Preset] = STATIC_PRESETS | SEQUENCE_PRESETS

STRATEGIES = tuple(dict.fromkeys(preset.strategy for preset in PRESETS.values()))


def find_preset(strategy: str, preset: str | None = None) -> Preset:
    """The preset of that name, or the strategy's default: the first in `PRESETS`.

    Raises:
        StrategyError: an unknown strategy.
        RunError: an unknown preset, or one for another strategy.
    """
    if strategy not in STRATEGIES:
        raise StrategyError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if preset is None:
        return next(found for found in PRESETS.values() if found.strategy == strategy)
    if preset not in PRESETS:
        raise RunError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    found = PRESETS[preset]
    if found.strategy != strategy:
        raise RunError(f"preset {preset!r} is for the strategy {found.strategy!r}, not {strategy!r}")
    return found
