"""The command line: ``pnem train``, ``evaluate``, ``infer``, ``diagnose``, ``animate``, ``compare`` and the others."""

import errno
import json
import math
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from pnem import __version__
from pnem.animate_command import animate
from pnem.bench_command import bench
from pnem.compare_command import compare
from pnem.data_command import data_app
from pnem.diagnose_command import diagnose
from pnem.em_command import em
from pnem.errors import PnemError
from pnem.generalise_command import generalise

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Commands whose errors become one clear message on stderr, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; exit code 1 after an error, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except PnemError as error:
            _complain(f"error: {error}")
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _complain(f"error: {error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _complain(str(error) or "interrupted")
            raise typer.Exit(130) from error


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _complain(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        _say(f"pnem {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
app.add_typer(data_app, name="data")


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Probabilistic modelling of images made of parts: one generative model, interchangeable inference.

    Example: `pnem demo`
    """


RunArgument = Annotated[Path, typer.Argument(help="A run directory, as pnem train wrote it.", metavar="RUN")]
DataArgument = Annotated[
    Path, typer.Argument(help="An HDF5 file as pnem data writes it; groups may be missing.", metavar="DATA")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the initial γ and of draws from q(θ).", min=0, max=2**32 - 1)]
FitSeedOption = Annotated[
    int, typer.Option(help="Seed of parameters, shuffling, noise, initial γ and draws of θ.", min=0, max=2**32 - 1)
]
SplitOption = Annotated[str, typer.Option(help="training, validation or test.")]
LimitOption = Annotated[int | None, typer.Option(help="Use only the first so many images or sequences.")]
RestartsOption = Annotated[
    int, typer.Option(help="Starts per image or sequence; the one with the best ELBO is kept. (A vae has one.)")
]
InferWithOption = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        help="Infer with another strategy than the run's: semi-amortised (which refines it), gradient-em, auto-delta, "
        "auto-normal, auto-multivariate-normal, auto-laplace, auto-iaf-normal or nuts.",
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Images or sequences at once.", min=1)]
IterationsOption = Annotated[
    int | None,
    typer.Option(
        help="T at inference; the default is that of training, and of sequences all that there are frames for."
    ),
]
PRESET_HELP = (
    "A recipe. For static images: rnn-em, quick-rnn-em or greff2017-static-rnn-em; n-em or greff2017-static-n-em; "
    "iodine-static-shapes; vae-mnist. For sequences: flying-shapes, flying-mnist, bouncing-balls, "
    "relational-bouncing-balls, greff2017-flying-shapes, greff2017-flying-mnist or greff2017-flying-mnist-later. The "
    "default is the strategy's first."
)
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile the unroll: a slow start, faster steps; if left out, where it pays."
    ),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--activation-checkpointing", help="Less memory (√T iterations in place of T) for one more pass forwards."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DevicesOption = Annotated[
    int, typer.Option(help="How many devices of this machine share every batch, a process on each.")
]
NodesOption = Annotated[
    int, typer.Option(help="How many machines do: start the command by torchrun --no-python on each of them.")
]


@app.command()
def train(
    data: DataArgument,
    strategy: Annotated[str, typer.Option(help="rnn-em, n-em, iterative-vi, vae or r-nem.")],
    out: Annotated[Path, typer.Option(help="The run directory to write.")],
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    components: Annotated[int | None, typer.Option(help="K.")] = None,
    iterations: Annotated[
        int | None, typer.Option(help="T, E- and M-steps per image, or steps through a sequence.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images or sequences per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's.")] = None,
    seed: FitSeedOption = 0,
    device: DeviceOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    train_limit: Annotated[int | None, typer.Option(help="Use only the first so many of the training split.")] = None,
    compile: CompileOption = None,  # noqa: A002
    activation_checkpointing: CheckpointingOption = False,
    truncation: Annotated[
        int | None,
        typer.Option(help="Frames (on images iterations) over which gradients flow back; all when left out."),
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A run whose weights to begin with: of an earlier stage, say.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out after its last epoch.")] = False,
) -> None:
    """Train a strategy together with its model.

    Example: `pnem train shapes.h5 --strategy rnn-em --out runs/rnn-em`
    """
    import torch

    from pnem.data import ImageDataset
    from pnem.distributed import is_first
    from pnem.presets import find_preset
    from pnem.training import fit

    recipe = find_preset(strategy, preset)
    image_shape = ImageDataset.from_hdf5(data, "training", with_groups=False).image_shape
    torch.manual_seed(seed)
    parts = recipe.build(image_shape, components=components, iterations=iterations)
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "train_limit": train_limit}
    given["truncation"] = truncation
    settings = {**recipe.training, **{name: value for name, value in given.items() if value is not None}}
    run = fit(
        parts.model,
        parts.strategy,
        data,
        objective=parts.objective,
        out=out,
        resume=resume,
        start_from=start_from,
        seed=seed,
        device=device,
        devices=devices,
        nodes=nodes,
        precision=precision,
        compile="auto" if compile is None else compile,
        activation_checkpointing=activation_checkpointing,
        **settings,
    )
    if not is_first():
        return
    best = run.history.iloc[int(run.history["valid_loss"].argmin())]
    ari = "" if math.isnan(best["valid_ari"]) else f", ARI {best['valid_ari']:.3f}"
    unit = "frame" if run.strategy.is_sequential else "image"
    _say(
        f"trained {len(run.history)} epochs in {run.history['seconds'].iloc[-1]:.0f} s; "
        f"best epoch {best['epoch']:.0f}: ELBO {best['valid_elbo']:.2f} nats per {unit}{ari} on the validation split\n"
        f"the run is in {out}; next: pnem evaluate {out} {data}"
    )


@app.command()
def evaluate(
    run: RunArgument,
    data: DataArgument,
    strategy: InferWithOption = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    restarts: RestartsOption = 1,
    iterations: IterationsOption = None,
    importance_samples: Annotated[
        int | None, typer.Option(help="Also estimate log p(x), with so many draws from q(θ) for each image.")
    ] = None,
    rollout: Annotated[
        int, typer.Option(help="Of sequences, predict so many frames at the end without seeing them.", min=0)
    ] = 0,
    batch_size: BatchOption = 100,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file.")] = None,
) -> None:
    """Score a run: grouping against the true objects where the data have them, evidence, reconstruction.

    Strategies whose q(θ) is a distribution, such as vae, also have an ELBO, and log p(x) by importance weighting.

    Runs on sequences are scored over time: grouping, identity switches, prediction of the next frame, rollouts.

    `--strategy` infers in the same model with another strategy, unamortised: slow, so give a `--limit`.

    Example: `pnem evaluate runs/rnn-em shapes.h5 --limit 1000 --restarts 8`
    """
    from pnem.files import check_new, write_atomically
    from pnem.run import load
    from pnem.sequence_scores import SequenceScores

    if json_file is not None:
        check_new(json_file)
    fitted = load(run, device=device)
    scores = (fitted if strategy is None else fitted.using(strategy)).evaluate(
        data,
        split=split,
        limit=limit,
        restarts=restarts,
        iterations=iterations,
        importance_samples=importance_samples,
        rollout=rollout,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    if isinstance(scores, SequenceScores):
        what = f"{scores.sequences} {split} sequences"
        caption = "over all steps but the first, then over sequences"
    else:
        what, caption = f"{scores.images} {split} images", "all but AMI and ARI in nats per image"
    table = Table(title=f"{run}{'' if strategy is None else f' by {strategy}'} on {what}", caption=caption)
    table.add_column("score")
    table.add_column("mean", justify="right")
    table.add_column("standard error", justify="right")
    for row in scores.rows():
        table.add_row(*row)
    Console().print(table)
    if json_file is not None:
        values = {name: _jsonable(value) for name, value in scores._asdict().items()}
        write_atomically(json_file, (json.dumps(values, indent=2) + "\n").encode())


def _jsonable(value: Any) -> Any:
    """The value, or the values of a curve; NaN, which is not JSON, becomes null."""
    if isinstance(value, tuple):
        return [_jsonable(entry) for entry in value]
    return None if value != value else value


@app.command()
def infer(
    run: RunArgument,
    data: DataArgument,
    out: Annotated[Path, typer.Option(help="The HDF5 file to write; it must not exist.")],
    strategy: InferWithOption = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    restarts: RestartsOption = 1,
    iterations: IterationsOption = None,
    batch_size: BatchOption = 100,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Write responsibilities, labels, each component's prediction and q(θ) to HDF5.

    Datasets: gamma (N, K, H, W), labels (N, H, W), psi as means (N, K, H, W, C), theta, the mean of q(θ), (N, K, M);
    where q(θ) is normal, theta_scale, its standard deviations, (N, K, M).

    Of sequences all have a leading axis of steps, and prediction (S, N, H, W, C) is what the components expect together
    of a frame before it is seen.

    Example: `pnem infer runs/rnn-em shapes.h5 --out pred.h5 --limit 1000`
    """
    from pnem.predictions import write_predictions
    from pnem.run import load

    fitted = load(run, device=device)
    count = write_predictions(
        fitted if strategy is None else fitted.using(strategy),
        data,
        out,
        split=split,
        limit=limit,
        restarts=restarts,
        iterations=iterations,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    contents, what = (
        ("gamma, labels, psi, theta and prediction", "sequences")
        if fitted.strategy.is_sequential
        else ("gamma, labels, psi and theta", "images")
    )
    _say(f"wrote {contents} of {count} {split} {what} to {out}")


app.command()(diagnose)
app.command()(animate)
app.command()(em)
app.command()(compare)
app.command()(generalise)
app.command()(bench)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The directory to write; it must not exist.")] = Path("pnem-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.", min=0, max=2**32 - 1)] = 0,
    device: DeviceOption = "auto",
    small: Annotated[bool, typer.Option("--small", help="A minute's worth of work, to see that all runs.")] = False,
) -> None:
    """Make data, train both strategies briefly, compare them, draw the figures.

    Example: `pnem demo --out pnem-demo`
    """
    from pnem.demo import run_demo

    run_demo(out, seed=seed, device=device, small=small, console=Console())


def main(arguments: list[str] | None = None) -> None:
    """The entry point of the command line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        app(arguments, prog_name="pnem")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, without the place in the code that it comes from."""
    typer.echo(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()
