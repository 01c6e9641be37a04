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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
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
        data = _written(options, f"flying{n}.h5", write_flying_shapes, num_objects=n, seed=0)
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
        data = _written(options, f"{name}.h5", write_flying_mnist, variations=variations, seed=stage)
        run = _trained(options, name, data, "flying-mnist", start_from=before)
        before = run.directory
        found[name] = _scored(options, run, data)
        _say(name, found[name])
    _write(options, "mnist", found)


def balls(options: argparse.Namespace) -> None:
    """The same networks with and without interactions, on the same data."""
    data = _written(options, "balls.h5", write_bouncing_balls, num_frames=21 + HORIZON, seed=0)
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


def _written(options: argparse.Namespace, name: str, write: Callable[..., None], **settings: Any) -> Path:
    """A data file that is there, if it is as large as asked, or else one that is now."""
    path, sizes = options.out / name, _sizes(options)
    if not path.exists():
        write(path, **settings, **sizes, progress=True)
    with h5py.File(path) as file:
        held = [file[split]["features"].shape[1] for split in ("training", "validation", "test")]
    if held != list(sizes.values()):
        raise SystemExit(f"{path} holds {held} sequences, not {list(sizes.values())}: give another --out")
    return path


def _trained(
    options: argparse.Namespace,
    name: str,
    data: Path,
    preset: str,
    *,
    components: int | None = None,
    start_from: Path | None = None,
) -> Run:
    """A run that is there and finished, or else one that is now; raises `RunError` where its settings are others."""
    recipe, directory = PRESETS[preset], options.out / name
    epochs = options.epochs if start_from is None or options.later_epochs is None else options.later_epochs
    settings: dict[str, Any] = {**recipe.training, "epochs": epochs, "precision": options.precision}
    settings |= {"compile": options.compile or "auto", "device": options.device, "seed": options.seed}
    if not directory.exists():
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


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is below 1")
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("autoencoder", "mnist", "balls"))
    parser.add_argument("--out", type=Path, required=True, help="where data, runs, tables and figures go")
    parser.add_argument("--epochs", type=_count, default=20)
    parser.add_argument(
        "--later-epochs", type=_count, help="of runs that start from another's weights; else as --epochs"
    )
    parser.add_argument("--train", type=_count, default=50_000, help="training sequences")
    parser.add_argument("--objects", type=_count, nargs="+", default=(3, 4, 5), help="of flying shapes")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=_count, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
