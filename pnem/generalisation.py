"""How a run does on other numbers of objects and components than it was trained with (Greff et al. 2017, table 1)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from pnem.data import ImageDataset
from pnem.errors import DataError
from pnem.files import write_atomically
from pnem.loading import open_split
from pnem.run import Run
from pnem.scores import Scores

__all__ = ["Generalisation", "generalise"]

Data = str | Path | ImageDataset | Mapping[str, ImageDataset]


@dataclass(frozen=True)
class Generalisation:
    """What `generalise` measured.

    Attributes:
        name: of the run.
        trained_components: K in training.
        split: which split the numbers are of.
        table: one row for each data set and number of components: ``data``, ``objects``, the most in an image;
            ``components``, K; ``count`` of images or sequences; and ``ami, ami_se, ari, ari_se, error``: for sequences
            that of the next frame predicted (of the frame, for denoising), for images the BCE of the reconstruction;
            in nats per frame or image for Bernoulli pixels.
    """

    name: str
    trained_components: int
    split: str
    table: pd.DataFrame

    def __rich__(self) -> Table:
        """AMI by data set and number of components, with standard errors."""
        fewest, most = self.table["count"].min(), self.table["count"].max()
        counts = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        table = Table(
            title=f"AMI of {self.name}, trained with K = {self.trained_components}",
            caption=f"of {counts} of the {self.split} split, ± standard error",
        )
        components = list(dict.fromkeys(self.table["components"]))
        table.add_column("data")
        table.add_column("objects", justify="right")
        for K in components:
            table.add_column(f"K = {K}", justify="right")
        for (name, objects), rows in self.table.groupby(["data", "objects"], sort=False):
            by_components = rows.set_index("components")
            cells = [f"{by_components.ami[K]:.3f} ± {by_components.ami_se[K]:.3f}" for K in components]
            table.add_row(str(name), str(objects), *cells)
        return table

    def to_json(self, path: str | Path) -> None:
        """Writes the table, one object per row; a number that is not there is null.

        Raises:
            DataError: the file exists.
        """
        path = Path(path)
        if path.exists():
            raise DataError(f"{path} exists already: choose another name")
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        contents: dict[str, Any] = {"run": self.name, "trained_components": self.trained_components}
        contents |= {"split": self.split, "rows": rows}
        write_atomically(path, (json.dumps(contents, indent=2) + "\n").encode())


def generalise(
    run: Run,
    data: Mapping[str, Data],
    components: Sequence[int],
    *,
    split: str = "test",
    **options: Any,
) -> Generalisation:
    """Scores a run on data sets with other numbers of objects, and with other numbers of components than in training.

    Args:
        run: a fitted run, of images or of sequences, with uniform mixing weights.
        data: the data sets by name, all with true groups.
        components: the numbers K to infer with.
        split: which split.
        **options: ``limit, restarts, iterations, batch_size, seed, progress`` of `Run.evaluate`.

    Raises:
        DataError: no data, or some without groups, or that do not fit the run.
        ModelError: K < 1.
        RunError: the model's mixing weights are of its own K alone.
    """
    if not data or not components:
        raise DataError("there is nothing to score: give at least one data set and one number of components")
    datasets = {name: open_split(given, split, run.strategy) for name, given in data.items()}
    for name, dataset in datasets.items():
        if not dataset.has_groups:
            raise DataError(f"{name} has no groups to compare with: give data with the true objects")
    runs = {K: run.with_components(K) for K in dict.fromkeys(components)}
    rows = []
    for name, dataset in datasets.items():
        shown = dataset if options.get("limit") is None else dataset.limited(options["limit"])
        objects = int(_most_objects(shown))
        for K, fitted in runs.items():
            scores = fitted.evaluate({split: dataset}, split=split, **options)
            row = {"data": name, "objects": objects, "components": K}
            row |= {measure: getattr(scores, measure) for measure in ("ami", "ami_se", "ari", "ari_se")}
            if isinstance(scores, Scores):
                row |= {"error": scores.bce, "count": scores.images}
            else:
                row |= {"error": scores.prediction_error, "count": scores.sequences}
            rows.append(row)
    name = type(run.strategy).__name__ if run.directory is None else run.directory.name
    return Generalisation(name, run.model.num_components, split, pd.DataFrame(rows))


def _most_objects(dataset: ImageDataset, batch_size: int = 100) -> int:
    most = 0
    for start in range(0, len(dataset), batch_size):
        groups = dataset[start : start + batch_size].groups
        assert groups is not None
        most = max(most, int(groups.max()))
    return most
