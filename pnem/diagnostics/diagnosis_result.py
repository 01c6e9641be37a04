"""What `pnem.diagnostics.diagnose` found, as tables, figures and JSON."""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pnem.diagnostics.findings import Finding
from pnem.diagnostics.gap_result import InferenceGap
from pnem.diagnostics.reliability import Reliability
from pnem.diagnostics.tracing import Trace
from pnem.inference import Posterior
from pnem.metrics import mean_and_standard_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Diagnosis"]

# In the order in which they make up the two forms of the ELBO.
TERMS = {
    "expected_log_joint": "Q, expected complete-data log-likelihood",
    "assignment_entropy": "H[q(z)], entropy of γ",
    "log_prior": "E[log p(θ)]",
    "theta_entropy": "H[q(θ)]",
    "reconstruction": "E[log p(x | θ)], reconstruction",
    "divergence": "KL(q(θ) ‖ p(θ))",
    "assignment_divergence": "KL(q(z) ‖ p(z | x, θ))",
}
# What `absent` says there is none of, where its name is no word.
ABSENT = {
    "k_hat": "k̂",
    "gradient_snr": "signal-to-noise ratio of gradients",
    "elbo_spread": "spread of the ELBO over restarts",
    "pairwise_ari": "ARI between restarts",
}
# Images of which γ is shown.
SHOWN = 4
# Of the ELBO: a term that is smaller is rounding, and not shown.
NEGLIGIBLE = 1e-7
COURSE = {"confidence": "mean of max γ", "components_used": "components used", "ami": "AMI", "ari": "ARI"}


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All diagnostics of one run; printed, it is tables and findings.

    Attributes:
        name: of the run.
        split: of the data.
        trace: how inference goes; see `pnem.diagnostics.trace`.
        gap: what it loses; see `pnem.diagnostics.inference_gap`. None where `absent` says why.
        reliability: whether its numbers can be relied on; see `pnem.diagnostics.reliability`.
        findings: what is wrong: of these parts, and of `pnem.diagnostics.collapse`.
        absent: what there is none of, and why.
        image_shape: (H, W, C).
        x, posterior: the first few images, (B, D, C), and their posterior.
    """

    name: str
    split: str
    trace: Trace
    gap: InferenceGap | None
    reliability: Reliability
    findings: list[Finding]
    absent: dict[str, str]
    image_shape: tuple[int, int, int]
    x: Tensor
    posterior: Posterior

    @property
    def images(self) -> dict[str, int]:
        """How many images each part is of."""
        reliable = self.reliability.k_hat if self.reliability.k_hat is not None else self.reliability.elbo_spread
        return {
            "trace": self.trace.elbo.shape[1],
            "gap": 0 if self.gap is None else len(self.gap.elbo),
            "reliability": 0 if reliable is None else len(reliable),
        }

    def figures(self) -> "dict[str, Figure]":
        """A figure of each part that is there, by a name for its file."""
        from pnem import plots

        found = {
            "elbo-terms": plots.elbo_terms(self.trace.terms),
            "trace": plots.trace(self.trace),
        }
        if self.posterior.gamma.shape[-2] > 1:
            found["entropy-maps"] = plots.entropy_maps(
                self.x, self.posterior, self.image_shape, images=range(min(SHOWN, len(self.x)))
            )
        if self.gap is not None:
            found["inference-gap"] = plots.inference_gap({self.name: self.gap})
        if self.reliability.k_hat is not None:
            found["k-hat"] = plots.k_hat({self.name: self.reliability})
        if self.reliability.calibration is not None:
            found["calibration-ranks"] = plots.calibration_ranks(self.reliability.calibration)
        return found

    def to_json(self) -> str:
        """All numbers but those of single images; what there is none of is null, or left out where it is `absent`."""
        content = {
            "run": self.name,
            "split": self.split,
            "images": self.images,
            "elbo_is_bound": self.trace.terms.is_bound,
            "iterations": self.trace.table().reset_index().to_dict("records"),
            "gap": None if self.gap is None else _numbers_of_gap(self.gap),
            "reliability": _numbers_of_reliability(self.reliability),
            "findings": [finding._asdict() for finding in self.findings],
            "absent": self.absent,
        }
        return json.dumps(_without_nan(content), indent=2, ensure_ascii=False) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Tables of what was measured, then what is wrong, then what is absent."""
        images = self.images
        yield self._course()
        if self.gap is not None:
            yield _table(f"what inference loses, {_images(images['gap'])}", "nats per image", self.gap.rows())
        if rows := self.reliability.rows():
            yield _table(f"whether it can be relied on, {_images(images['reliability'])}", "", rows)
        yield Text("findings" if self.findings else "no findings", "bold")
        for finding in self.findings:
            yield Text.assemble("• ", (finding.name, "bold"), f": {finding.seen}; {finding.advice}")
        for why in dict.fromkeys(self.absent.values()):
            names = [ABSENT.get(name, name.replace("_", " ")) for name, reason in self.absent.items() if reason == why]
            yield Text(f"no {' and '.join(names)}: {why}", "dim")

    def __repr__(self) -> str:
        console = Console(color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def _course(self) -> Table:
        """The terms after the first iteration that they are known of, and after the last."""
        course = self.trace.table()
        known = course.dropna(subset=["reconstruction"])
        iterations = list(dict.fromkeys([known.index[0], known.index[-1]]))
        table = Table(title=f"{self.name}, means over {_images(self.images['trace'], self.split)}")
        for column in ("nats per image", *(f"iteration {iteration}" for iteration in iterations)):
            table.add_column(column, justify="left" if column == "nats per image" else "right")
        largest = known["elbo"].abs().max()
        terms = {name: title for name, title in TERMS.items() if known[name].abs().max() > NEGLIGIBLE * largest}
        for name, title in (terms | {"elbo": self.trace.title}).items():
            table.add_row(Text(title), *(f"{known.loc[iteration, name]:.2f}" for iteration in iterations))
        table.add_section()
        # One component has all of γ.
        divided = self.posterior.gamma.shape[-2] > 1
        for name, title in COURSE.items():
            if divided and name in known and known[name].notna().any():
                table.add_row(title, *(f"{known.loc[iteration, name]:.3f}" for iteration in iterations))
        return table


def _images(count: int, split: str = "") -> str:
    return f"{count:,} {split}{' ' if split else ''}image{'' if count == 1 else 's'}"


def _table(title: str, heading: str, rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title)
    for column in (heading, "mean", "standard error"):
        table.add_column(column, justify="left" if column == heading else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _numbers_of_gap(gap: InferenceGap) -> dict[str, Any]:
    names = ("total", "approximation", "amortisation", "optimality")
    values = {name: estimate for name in names if (estimate := getattr(gap, name)) is not None}
    return {name: {"mean": e.mean, "standard_error": e.standard_error} for name, e in values.items()} | {
        "amortised": gap.amortised,
        "estimator": gap.estimator,
        "still_rising": int(gap.rising.sum()),
    }


def _numbers_of_reliability(found: Reliability) -> dict[str, Any]:
    numbers: dict[str, Any] = {"gradient_snr": found.gradient_snr}
    for name in ("k_hat", "effective_sample_size"):
        values = getattr(found, name)
        if values is not None:
            numbers[f"median_{name}"] = values.median().item()
    for name in ("elbo_spread", "pairwise_ari"):
        values = getattr(found, name)
        if values is not None:
            numbers[name] = mean_and_standard_error(values)._asdict()
    if found.calibration is not None:
        numbers["calibration_p_values"] = found.calibration.p_values
    return numbers


def _without_nan(value: Any) -> Any:
    """NaN and infinities are not JSON."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
