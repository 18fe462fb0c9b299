"""What a report says, as plain rows of text with the numbers to sort and to draw by; the templates only lay it out."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Value:
    """One entry of a table."""

    text: str
    detail: str = ""  # spread, interval, number of repetitions
    sort: float | str | None = None  # None: there is no figure, last in every order


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    hint: str = ""  # what the figure is
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A sortable table; its first column names the row."""

    title: str
    columns: list[Column]
    rows: list[list[Value]]
    sorted_by: int | None = None  # the column the rows come sorted by, largest first


@dataclass(frozen=True)
class Whisker:
    """A figure and its interval as shares 0..1 of an axis."""

    centre: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bar:
    """One bar with its figures; where it failed, why."""

    label: str
    note: str
    bar: Whisker | None  # from the axis's left end
    values: list[Value]  # one a column
    delta: Whisker | None = None  # the difference from the first bar, where it is drawn
    error: str | None = None
    failed: bool = False  # whether something went wrong: what this device lacks is left out without harm


@dataclass(frozen=True)
class Bars:
    """A bar chart that is also a table."""

    anchor: str
    title: str
    intro: str
    heading: str  # of the labels
    columns: list[str]
    bars: list[Bar]
    delta_title: str = ""  # of the differences' axis, when they are drawn
    delta_zero: float = 0.5  # where no difference lies on it, 0..1
    delta_ends: tuple[str, str] = ("", "")  # what its two ends mean
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in pixels and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Frame:
    """A chart's size and plotting area in pixels, and its ticks."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class Mark:
    """One labelled point of the scatter, in pixels."""

    label: str
    title: str  # all its figures, for those who point at it
    x: float
    y: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    front: bool  # on the Pareto front
    label_x: float = 0.0
    label_y: float = 0.0  # the text's baseline
    anchor: str = "start"
    leader: tuple[float, float] | None = None  # where a line from the point to a far label ends


@dataclass(frozen=True)
class Scatter:
    """Speed against accuracy."""

    frame: Frame
    marks: list[Mark]
    front: str  # path of the Pareto front


@dataclass(frozen=True)
class Panel:
    """The learning curve of one variant."""

    label: str
    caption: str
    line: str  # path of the mean over seeds
    band: str  # path around lowest and highest seed, "" with one seed


@dataclass(frozen=True)
class Curves:
    """Learning curves on the same axes, a panel each; all of them stand in grey behind each."""

    anchor: str
    title: str
    x_title: str
    frame: Frame
    panels: list[Panel]
    background: str  # all lines as one path


@dataclass(frozen=True)
class Report:
    """A whole page."""

    title: str
    lead: list[str]  # sentences of the summary
    warnings: list[str]  # banners
    headlines: list[tuple[str, str, str]]  # what, figure, detail
    scatters: list[Scatter]  # the same one, wide and narrow
    scatter_note: str
    tables: list[Table]
    table_notes: list[str]
    curves: list[Curves]
    curves_note: str
    bars: list[Bars]
    failures: list[tuple[str, str]]  # cell, error
    method: list[str]
    environment: list[tuple[str, str]]
