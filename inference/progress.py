"""A progress bar for fits that take their time."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["Progress"]


class Progress:
    """Iterations done, and of a stream the items seen in the present one; on standard error, nothing unless `shown`."""

    def __init__(self, iterations: int, *, shown: bool, description: str = "EM"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            # Standard output is for results.
            console=Console(stderr=True),
            disable=not shown,
        )
        self.shown = shown
        self._iterations = self._bars.add_task(description, total=iterations, note="")
        self._items: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, items: int) -> None:
        """There are so many items."""
        self._items = self._bars.add_task("items", total=items, note="")

    def see(self, items: int) -> None:
        """So many more have been seen."""
        if self._items is not None:
            self._bars.advance(self._items, items)

    def advance(self, elbo: float) -> None:
        """An iteration is done; `elbo` in nats per item."""
        self._bars.update(self._iterations, advance=1, note=f"{elbo:.6g} nats per item")
        if self._items is not None:
            self._bars.reset(self._items)
