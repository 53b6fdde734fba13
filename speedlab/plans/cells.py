"""The cells of a sweep: every pair of values of its two axes, and which cell each one is compared with. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .axes import MOST_CELLS, OWN_COLUMN, Axis
from .plan_text import STOCK, SweepTextError
from .settings import CellSettings


@dataclass(frozen=True)
class Cell:
    """One cell: its place in the grid, the labels of its values by axis, and its settings."""

    x: int
    y: int
    labels: tuple[tuple[str, str], ...]
    settings: CellSettings

    @property
    def name(self) -> str:
        """`steps 20, cfg 7`; `stock` for a sweep without axes."""
        return ", ".join(f"{axis} {label}" for axis, label in self.labels) or self.settings.plan


def make_cells(base: CellSettings, axis_x: Axis, axis_y: Axis) -> tuple[Cell, ...]:
    """Every cell, row by row. Raises SweepTextError for the same axis twice, too many cells or impossible settings."""
    if axis_x.name == axis_y.name and axis_x.name != "none":
        raise SweepTextError(f"Both axes are {axis_x.name}: choose two different ones, or none for the second.")
    axes = {axis.name: axis for axis in (axis_x, axis_y)}
    for other, mark in (("steps", "@"), ("scheduler", "/")):
        written = [value.label for value in axes["sampler"].values if mark in value.label] if "sampler" in axes else []
        if other in axes and written:
            raise SweepTextError(
                f"The sampler axis sets {other} too ('{written[0]}') where {other} is the other axis: leave out what "
                f"stands behind {mark}, or choose another second axis."
            )
    if axis_x.open_end and axis_y.open_end:
        raise SweepTextError("Only one axis may end in max.")
    count = len(axis_x.values) * len(axis_y.values)
    if count > MOST_CELLS:
        raise SweepTextError(f"{count} cells are more than {MOST_CELLS}: leave some values out.")
    return tuple(
        make_cell(base, axis_x, axis_y, x, y) for y in range(len(axis_y.values)) for x in range(len(axis_x.values))
    )


def make_cell(base: CellSettings, axis_x: Axis, axis_y: Axis, x: int, y: int) -> Cell:
    """The cell at one place. A plan is applied before other axes, so that their values hold."""
    pairs = [(axis_x, axis_x.values[x]), (axis_y, axis_y.values[y])]
    settings = base
    for _, value in sorted(pairs, key=lambda pair: pair[0].name != "plan"):
        settings = value.apply(settings)
    labels = tuple((axis.name, value.label) for axis, value in pairs if axis.name != "none")
    return Cell(x, y, labels, replace(settings, plan=_plan_name(settings.plan, labels)))


def _plan_name(plan: str, labels: tuple[tuple[str, str], ...]) -> str:
    """The plan column of a cell: what no other column of a table would tell apart is named there."""
    told = [f"{axis}={label}" for axis, label in labels if axis not in OWN_COLUMN and axis != "plan"]
    return ", ".join([*([] if plan == STOCK and told else [plan]), *told])


def baseline_of(cell: Cell, axis_x: Axis, axis_y: Axis) -> tuple[int, int]:
    """The place of the cell that `cell`'s pictures are compared with.

    A mark on one axis compares along that axis, within the row or column of the cell. Marks on both axes, or on none,
    name one cell for all: the marked or first one.
    """
    marked_x, marked_y = axis_x.baseline, axis_y.baseline
    if marked_x is not None and marked_y is None:
        return marked_x, cell.y
    if marked_y is not None and marked_x is None:
        return cell.x, marked_y
    return marked_x or 0, marked_y or 0
