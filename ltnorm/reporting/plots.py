"""Figures, by matplotlib, which is imported when one is drawn (the extra `plot`)."""

import importlib.util
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltnorm.errors import UsageError
from ltnorm.reporting.inspection import Inspected, number
from ltnorm.reporting.schema import check_file

if TYPE_CHECKING:
    from ltnorm.evaluation.inspection import Density

ENDINGS = (".png", ".pdf", ".svg")
DPI = 150
CELL = 0.6  # inches
# One hue from light to dark: it reads the same in grey and to the colour-blind.
COLOURS = "Blues"
DIVERGING = "PuOr_r"  # purple below, orange above: what has a middle that is normal
# A group by its line as well as by its colour (Okabe & Ito 2008).
LINES = {"head": ("#0072B2", "-"), "medium": ("#D55E00", "--"), "tail": ("#009E73", "-.")}
MOST_NUMBERS = 12  # cells a row of a heat map with room for their numbers
# Fonts that have what matplotlib's own lacks.
FONTS = (
    *(
        "Noto Sans CJK JP",
        "Noto Sans CJK SC",
        "Source Han Sans",
        "WenQuanYi Zen Hei",
        "Droid Sans Fallback",
    ),
    *("Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei"),
    *("Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS"),
)


class NoMatplotlib(UsageError):
    """A figure is asked for, and matplotlib is not installed."""


def check(path: Path) -> None:
    """Check, before work starts, that a figure can be drawn into a file.

    Raises:
        UsageError: another ending than .png, .pdf or .svg, or not writable.
        NoMatplotlib: the extra `plot` is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(
            f"--plot {path} is of no known kind of image", f"end it in {', '.join(ENDINGS)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise NoMatplotlib("--plot needs matplotlib", 'pip install "ltnorm[plot]"')
    check_file(path, "--plot")


def inspection(runs: Sequence[Inspected], densities: Sequence["Density"], ending: str) -> bytes:
    """A row of panels a run: shift, variance, shares of components, and one channel's density.

    Args:
        runs: at least one. Panels of one kind have one scale of colours.
        densities: of the same runs.
        ending: of the file, such as ".png".
    """
    from matplotlib.figure import Figure

    shares = max(len(_share_columns(one)) for one in runs)
    groups = max(len(one.inspection.groups) for one in runs)
    layers = [len(one.inspection.layers) for one in runs]
    heights = [max(2.6, 0.21 * n) + 1.0 for n in layers]
    widths = [CELL * groups] * 2 + ([CELL * min(shares, MOST_NUMBERS)] if shares else []) + [4.4]
    figure = Figure(figsize=(sum(widths) + 3.8, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    parts = figure.subfigures(len(runs), 1, height_ratios=heights, squeeze=False)[:, 0]
    scales = _scales(runs)
    for part, one, density in zip(parts, runs, densities, strict=True):
        part.suptitle(one.title, fontsize=10, fontweight="bold")
        axes = part.subplots(1, len(widths), width_ratios=widths)
        _features(axes, one, scales)
        if shares:
            _shares(axes[2], one)
        _density(axes[-1], density)
    return rendered(figure, ending)


def rendered(figure: Any, ending: str) -> bytes:
    """A figure as the content of a file with that ending, such as ".png".

    The same figure gives the same bytes: there is no date in them. Text in a PDF keeps its
    outlines as TrueType, which publishers ask for.
    """
    import matplotlib

    kind = ending.lower().lstrip(".")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ltnorm", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=undated)
    return buffer.getvalue()


@contextmanager
def any_text() -> Iterator[None]:
    """Within it figures take names as they are, in any script.

    A dollar sign starts no formula, and a glyph that no font has is a box, no warning.
    """
    import matplotlib
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    fonts = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    with (
        matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def lines(text: str, width: int, most: int = 2) -> str:
    """Text as it can be drawn, in at most `most` lines of `width` characters.

    It has no control characters, and no bytes of a path that are no text.
    """
    return "\n".join(textwrap.wrap(_plain(text), width, max_lines=most, placeholder="…"))


def line(text: str, width: int) -> str:
    """Text as it can be drawn, cut to one line of `width` columns; wide signs take two."""
    from rich.text import Text

    cut = Text(_plain(text))
    cut.truncate(width, overflow="ellipsis")
    return cut.plain


def _plain(text: str) -> str:
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)


@dataclass(frozen=True)
class Scale:
    """The colours of a quantity: pale where it is `normal`, darkest where it is `most` away.

    `sides` are the directions in which it can be away: one, upwards, or two.
    """

    normal: float
    most: float
    sides: int = 1

    @property
    def drawn(self) -> dict[str, Any]:
        """As matplotlib takes it for an image."""
        low = self.normal - (self.sides - 1) * self.most
        cmap = COLOURS if self.sides == 1 else DIVERGING
        return {"cmap": cmap, "vmin": low, "vmax": self.normal + self.most}

    def dark(self, value: float) -> bool:
        """Whether a text on the colour of a value has to be white."""
        return abs(value - self.normal) > 0.6 * self.most


def _scales(runs: Sequence[Inspected]) -> dict[str, Scale]:
    """The colours of each quantity, the same for all runs."""
    found = {}
    for quantity, (normal, sides) in {"shift": (0.0, 1), "variance": (1.0, 2)}.items():
        away = [
            abs(getattr(layer, quantity)[group] - normal)
            for one in runs
            for layer in one.inspection.layers
            for group in one.inspection.groups
        ]
        found[quantity] = Scale(normal, max(*away, 1e-9), sides)  # never a range of nothing
    return found


def _features(axes: Sequence[Any], one: Inspected, scales: dict[str, Scale]) -> None:
    layers, groups = one.inspection.layers, one.inspection.groups
    titles = {"shift": "mean shift in std (0: none)", "variance": "variance (1: as normalized)"}
    for axis, (quantity, title) in zip(axes, titles.items(), strict=False):
        cells = [[getattr(layer, quantity)[g] for g in groups] for layer in layers]
        _heat_map(axis, cells, groups, scales[quantity], number)
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(layers)), [""] * len(layers))
    axes[0].set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)


def _share_columns(one: Inspected) -> list[tuple[int, str]]:
    """Component and group of each column of the shares; none for a norm that assigns nothing."""
    components = max(len(x.shares["all"]) if x.shares else 0 for x in one.inspection.layers)
    return [(k, g) for k in range(components) for g in one.inspection.groups]


def _shares(axis: Any, one: Inspected) -> None:
    columns = _share_columns(one)
    if not columns:
        axis.set_axis_off()
        nothing = "assigns nothing to components"
        axis.text(0.5, 0.5, nothing, ha="center", va="center", fontsize=8, color="0.4")
        return
    layers, groups = one.inspection.layers, one.inspection.groups
    cells = [[100 * x.shares[g][k] if x.shares else math.nan for k, g in columns] for x in layers]
    names = [g for _, g in columns]
    _heat_map(axis, cells, names, Scale(0.0, 100.0), "{:.0f}".format)
    for k in range(1, len(columns) // len(groups)):
        axis.axvline(k * len(groups) - 0.5, color="black", linewidth=1.5)
    axis.set_title("share of each component in %", fontsize=9)
    axis.set_yticks(range(len(layers)), [""] * len(layers))
    below = axis.secondary_xaxis("bottom")
    middles = [(k + 0.5) * len(groups) - 0.5 for k in range(len(columns) // len(groups))]
    below.set_xticks(middles, [f"component {k}" for k in range(len(middles))], fontsize=8)
    below.tick_params(length=0, pad=3 if len(columns) > MOST_NUMBERS else 16)


def _heat_map(
    axis: Any,
    cells: list[list[float]],
    columns: Sequence[str],
    scale: Scale,
    shown: Callable[[float], str],
) -> None:
    image = axis.imshow(cells, aspect="auto", **scale.drawn)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.tick_params(length=0)
    if len(columns) > MOST_NUMBERS:
        axis.set_xticks([])  # the components are named below
        axis.figure.colorbar(image, ax=axis)
        return
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            colour = "white" if scale.dark(value) else "black"
            axis.text(j, i, shown(value), ha="center", va="center", color=colour, fontsize=7)


def _density(axis: Any, density: "Density") -> None:
    """Histograms as lines, over the running Gaussians as grey areas and their sum in black."""
    edges = density.edges
    points = [edges[0] + (edges[-1] - edges[0]) * i / 400 for i in range(401)]
    total = [0.0] * len(points)
    several = len(density.components) > 1
    for k, (weight, mean, var) in enumerate(density.components):
        curve = [weight * _gaussian(x, mean, var) for x in points]
        total = [a + b for a, b in zip(total, curve, strict=True)]
        if several:
            grey = str(0.8 - 0.5 * k / len(density.components))
            label = f"component {k}: weight {weight:.2f}"
            axis.fill_between(points, curve, color=grey, alpha=0.7, linewidth=0, label=label)
    for group, heights in density.heights.items():
        colour, line = LINES[group]
        axis.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.4, label=group)
    if density.components:
        name = "running mixture" if several else "running Gaussian"
        axis.plot(points, total, color="black", linewidth=1.2, label=name)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(bottom=0)
    axis.set_title(f"input of {density.layer}, channel {density.channel}", fontsize=9)
    axis.set_xlabel("activation before the norm", fontsize=8)
    axis.set_ylabel("density", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(
        fontsize=7, frameon=False, handlelength=2.6, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )


def _gaussian(x: float, mean: float, var: float) -> float:
    return math.exp(-0.5 * (x - mean) ** 2 / var) / math.sqrt(2 * math.pi * var)
