"""The experiments on sequences that the README quotes, each in one command: run it as a script.

``autoencoder`` (Greff et al. 2017, figure 5): flying shapes of 3, 4 and 5 objects, as many components against one,
which is a recurrent autoencoder of the same networks, the same training; all but the first number of objects start
from the weights for the first. ``mnist``: two flying digits in three stages, of 20 and 500 variations and of all, each
from the weights of the one before. ``balls``: R-NEM against RNN-EM on bouncing balls, by the error of a rollout.

Data, runs, tables (JSON) and figures go into ``--out``. What is there already is used, and a training that was cut off
goes on after its last epoch, so that the same command continues an experiment that was interrupted. ``--small`` is a
minute's worth, to see that all runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pnem
from pnem import plots
from pnem.data import ImageDataset, write_bouncing_balls, write_flying_mnist, write_flying_shapes
from pnem.presets import PRESETS
from pnem.run import Run
from pnem.sequence_scores import SequenceScores

HORIZON = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one experiment; prints its table."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    {"autoencoder": autoencoder, "mnist": mnist, "balls": balls}[options.experiment](options)
    return 0


def autoencoder(options: argparse.Namespace) -> None:
    """As many components as objects, against one."""
    scores: dict[str, list[SequenceScores]] = {"RNN-EM, K = objects": [], "recurrent autoencoder, K = 1": []}
    objects = tuple(options.objects)
    first: dict[str, Path | None] = {}
    for n in objects:
        data = options.out / f"flying{n}.h5"
        if not data.exists():
            write_flying_shapes(data, num_objects=n, **_sizes(options), seed=0, progress=True)
        for name, K in zip(scores, (n, 1), strict=True):
            start = first.get(name)
            run = _trained(options, f"flying{n}-k{K}", data, "flying-shapes", components=K, start_from=start)
            first.setdefault(name, run.directory)
            scores[name].append(_scored(options, run, data))
    for name, found in scores.items():
        for n, s in zip(objects, found, strict=True):
            _say(f"{name}, {n} objects", s)
    _write(options, "autoencoder", {name: dict(zip(objects, found, strict=True)) for name, found in scores.items()})
    errors = {name: [s.prediction_error for s in found] for name, found in scores.items()}
    errors["RNN-EM, γ known"] = [s.reconstruction_error for s in scores["RNN-EM, K = objects"]]
    plots.curves_by_objects(errors, objects=objects).savefig(options.out / "autoencoder.png")


def mnist(options: argparse.Namespace) -> None:
    """Two digits, in three stages."""
    before: Path | None = None
    found = {}
    for stage, variations in enumerate((20, 500, None)):
        name = f"mnist-{'all' if variations is None else variations}"
        data = options.out / f"{name}.h5"
        if not data.exists():
            write_flying_mnist(data, variations=variations, **_sizes(options), seed=stage, progress=True)
        run = _trained(options, name, data, "flying-mnist", start_from=before)
        before = run.directory
        found[name] = _scored(options, run, data)
        _say(name, found[name])
    _write(options, "mnist", found)


def balls(options: argparse.Namespace) -> None:
    """The same networks with and without interactions, on the same data."""
    data = options.out / "balls.h5"
    if not data.exists():
        write_bouncing_balls(data, num_frames=21 + HORIZON, **_sizes(options), seed=0, progress=True)
    presets = {"RNN-EM": "bouncing-balls", "R-NEM": "relational-bouncing-balls"}
    found = {}
    for name, preset in presets.items():
        run = _trained(options, preset, data, preset)
        found[name] = _scored(options, run, data, rollout=HORIZON)
        _say(name, found[name])
    _write(options, "balls", found)
    plots.curves_by_horizon(
        {name: s.rollout_error for name, s in found.items()}, {name: s.rollout_error_se for name, s in found.items()}
    ).savefig(options.out / "balls.png")


def _trained(
    options: argparse.Namespace,
    name: str,
    data: Path,
    preset: str,
    *,
    components: int | None = None,
    start_from: Path | None = None,
) -> Run:
    """A run that is there and finished, or else one that is now."""
    recipe, directory = PRESETS[preset], options.out / name
    epochs = options.epochs if start_from is None or options.later_epochs is None else options.later_epochs
    settings: dict[str, Any] = {**recipe.training, "epochs": epochs, "precision": options.precision}
    settings |= {"compile": options.compile or "auto", "device": options.device, "seed": options.seed}
    if directory.exists() and len(pnem.load(directory).history) >= epochs:
        return pnem.load(directory, device=settings["device"] if settings["device"] != "auto" else "cpu")
    print(f"training {name}", flush=True)
    torch.manual_seed(options.seed)
    shape = ImageDataset.from_hdf5(data, "training").image_shape
    steps = 4 if options.small else None
    model, strategy, objective = recipe.build(shape, components=components, iterations=steps)
    return pnem.fit(
        model,
        strategy,
        data,
        objective=objective,
        out=directory,
        resume=directory.exists(),
        start_from=start_from,
        progress=sys.stderr.isatty(),
        **settings,
    )


def _scored(options: argparse.Namespace, run: Run, data: Path, rollout: int = 0) -> SequenceScores:
    scores = run.evaluate(data, rollout=rollout, seed=options.seed)
    assert isinstance(scores, SequenceScores)
    return scores


def _say(name: str, scores: SequenceScores) -> None:
    print(name, flush=True)
    for title, mean, error in scores.rows():
        print(f"    {title:60} {mean:>10} ± {error}", flush=True)


def _write(options: argparse.Namespace, name: str, found: Any) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, SequenceScores):
            return {key: None if number != number else number for key, number in value._asdict().items()}
        return {str(key): plain(entry) for key, entry in value.items()}

    (options.out / f"{name}.json").write_text(json.dumps(plain(found), indent=2) + "\n")


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    if options.small:
        return {"train": 64, "valid": 32, "test": 32}
    return {"train": options.train, "valid": 1_000, "test": 1_000}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("autoencoder", "mnist", "balls"))
    parser.add_argument("--out", type=Path, required=True, help="where data, runs, tables and figures go")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--later-epochs", type=int, help="of runs that start from another's weights; else as --epochs")
    parser.add_argument("--train", type=int, default=50_000, help="training sequences")
    parser.add_argument("--objects", type=int, nargs="+", default=(3, 4, 5), help="of flying shapes")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
