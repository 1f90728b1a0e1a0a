"""One self-contained HTML page that shows what was scored: no network, no server, nothing beside the file.

The page is ``report.html`` with the data put in as JSON; its script draws everything and writes names as text nodes
only, so a hostile file name stays a name. A content security policy forbids the page to load anything.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trajdist.files import write_bytes
from trajdist.scoring.histogram import Doubles
from trajdist.scoring.metrics import Points


@dataclass(frozen=True)
class ImageRow:
    """One image of the table. ``kind`` is "good" or the defect where there are labels."""

    image: str
    score: float
    p_value: float
    is_anomalous: bool
    kind: str | None = None


@dataclass(frozen=True)
class Picture:
    """One image of the gallery.

    Attributes:
        original, overlay: PNG or JPEG bytes, of one size; about 20 KB each keep the page light.
        block_errors: the error of each block at the hottest place, in the order of ``ReportData.blocks``.
    """

    row: ImageRow
    original: bytes
    overlay: bytes
    block_errors: Sequence[float] = ()


@dataclass(frozen=True)
class Metric:
    """One card. ``value`` is in 0..1, or None where it is not defined; ``low`` and ``high`` are the 95 % interval."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DefectKind:
    """One line of the table of defects; every kind has the same metrics."""

    kind: str
    num_images: int
    num_detected: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class CurvePair:
    """ROC and PR points of one level, "Images" or "Pixels"; from :class:`trajdist.scoring.metrics.Curve`."""

    name: str
    roc: Points
    pr: Points


@dataclass(frozen=True)
class ScoreBars:
    """Histograms of image scores on common edges, by name; from :func:`trajdist.scoring.histogram.plot_bins`.

    The colours follow the order: calibration first, then clean test images, then anomalous ones.
    """

    edges: Doubles
    counts: Mapping[str, Doubles]


@dataclass(frozen=True)
class MapScale:
    """The scores that heat maps show darkest and brightest, and colours (CSS) evenly spaced between them."""

    low: float
    high: float
    colours: Sequence[str]


@dataclass(frozen=True)
class ReportData:
    """What the page shows. Only the first four fields are required; what is left out is not shown.

    Attributes:
        title: such as the name of the run and of the data set.
        summary: short facts by name: run, phase, adapter, backbone, images per second.
        rows: images of the table; some ten thousand at most, about 100 bytes each.
        num_images: how many were scored; if that is more than there are rows, the page says so and leaves out
            the shares of images that were called anomalous, found or false alarms.
        threshold: scores of at least this are anomalous; infinite if none can be.
        false_alarm_rate: the rate that the threshold was set for.
        blocks: names of the blocks, shallow to deep.
        mistakes: where there are labels, missed defects and false alarms.
        best_adapters: of several adapters, the one that fits each row best; empty if there is only one.
        unreadable: names and errors of the first images that could not be read, of ``num_unreadable``.
    """

    title: str
    summary: Mapping[str, str | int | float]
    rows: Sequence[ImageRow]
    num_images: int
    threshold: float | None = None
    false_alarm_rate: float | None = None
    score_bars: ScoreBars | None = None
    metrics: Sequence[Metric] = ()
    defects: Sequence[DefectKind] = ()
    curves: Sequence[CurvePair] = ()
    blocks: Sequence[str] = ()
    map_scale: MapScale | None = None
    mistakes: Sequence[Picture] = ()
    most_anomalous: Sequence[Picture] = ()
    least_anomalous: Sequence[Picture] = ()
    best_adapters: Sequence[str] = ()
    unreadable: Sequence[tuple[str, str]] = ()
    num_unreadable: int = 0


def write_report(path: Path, data: ReportData) -> None:
    """Write the page, atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    page = resources.files("trajdist.scoring").joinpath("report.html").read_text(encoding="utf-8")
    head, rest = page.split("@TITLE@")
    middle, tail = rest.split("@DATA@")
    # Names that are not valid UTF-8 hold surrogates, which cannot be encoded: write them as character references.
    title = html.escape(data.title).encode("ascii", "xmlcharrefreplace").decode()
    write_bytes(path, f"{head}{title}{middle}{to_json(data)}{tail}".encode())


def to_json(data: ReportData) -> str:
    """The data as ASCII JSON without HTML markup: images as data URIs, numbers that are not finite as null."""
    text = json.dumps(asdict(data, dict_factory=_finite_fields), default=_plain, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite_fields(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields}


def _plain(value: Any) -> Any:
    """Convert what JSON cannot hold: image bytes and NumPy arrays."""
    if isinstance(value, bytes):
        kind = "png" if value.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(value).decode()}"
    return value.tolist()
