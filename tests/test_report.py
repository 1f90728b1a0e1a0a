"""The report: one page, all of the data in it, nothing loaded, hostile names harmless; and it works in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from outcome import write_rows
from PIL import Image

from trajdist.errors import ArtifactError
from trajdist.scoring import report
from trajdist.scoring.histogram import ScoreHistogram, plot_bins
from trajdist.scoring.metrics import Curve, bootstrap_interval, curve
from trajdist.scoring.page import (
    CurvePair,
    DefectKind,
    ImageRow,
    MapScale,
    Metric,
    Picture,
    ReportData,
    ScoreBars,
    write_report,
)

HOSTILE = "</script><script>alert(1)</script><!--\"'&\u2028\n<img src=x onerror=alert(2)>@DATA@@TITLE@$&.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def image_bytes(kind: str, level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (level, 80, 255 - level)).save(buffer, kind)
    return buffer.getvalue()


def picture(row: ImageRow) -> Picture:
    return Picture(row, image_bytes("JPEG", 10), image_bytes("PNG", 200), [0.5, 2.0, 1.0])


def histogram(scores: list[float]) -> ScoreHistogram:
    filled = ScoreHistogram()
    filled.update(torch.tensor(scores))
    return filled


def scored(num_rows: int) -> ReportData:
    """What ``score`` has: no labels."""
    scores = np.random.default_rng(0).permutation(num_rows) / num_rows
    rows = [ImageRow(f"image-{i:04}.png", float(s), 1 - float(s), bool(s > 0.9)) for i, s in enumerate(scores)]
    rows.sort(key=lambda row: -row.score)
    return ReportData(
        title="a run",
        summary={"run": "runs/one", "images per second": 12.5},
        rows=rows,
        num_images=num_rows,
        threshold=0.9,
        false_alarm_rate=0.1,
        score_bars=ScoreBars(*plot_bins({"calibration": histogram([0.1, 0.4]), "scored": histogram(scores.tolist())})),
        blocks=["layer1", "layer2", "layer3"],
        most_anomalous=[picture(row) for row in rows[:3]],
        least_anomalous=[picture(row) for row in rows[-2:]],
    )


def evaluated(num_rows: int) -> ReportData:
    """What ``evaluate`` has: labels and metrics as well, and file names meant to break the page."""
    plain = scored(num_rows)
    kinds = ["good", "crack", HOSTILE]
    rows = [dataclasses.replace(row, kind=kinds[i % 3]) for i, row in enumerate(plain.rows)]
    rows[0] = dataclasses.replace(rows[0], image=HOSTILE)
    clean, anomalous = (
        histogram([row.score for row in rows if (row.kind == "good") is good]) for good in (True, False)
    )
    ours = curve(anomalous, clean)
    low, high = bootstrap_interval(ours, Curve.area, num_samples=50)
    return dataclasses.replace(
        plain,
        title=HOSTILE,
        rows=rows,
        metrics=[Metric("Image AUROC", ours.area(), low, high), Metric("AUPRO", None)],
        defects=[DefectKind(kind, 5, 4, {"Image AUROC": 0.75, "AUPRO": None}) for kind in kinds[1:]],
        curves=[CurvePair("Images", ours.roc_points(), ours.pr_points()), CurvePair("Pixels", [], [])],
        most_anomalous=[picture(row) for row in rows[:3]],
    )


class Page(HTMLParser):
    """Tags in order, and the text that follows each, up to the next tag of either kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.is_open = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.append("")
        self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = False

    def handle_data(self, data):
        if self.is_open:
            self.texts[-1] += data

    def text_of(self, tag: str, **attributes: str) -> str:
        found = [
            text
            for (name, given), text in zip(self.tags, self.texts, strict=True)
            if name == tag and attributes.items() <= given.items()
        ]
        assert len(found) == 1
        return found[0]


def written(folder: Path, data: ReportData) -> tuple[Path, Page]:
    path = folder / "report.html"
    write_report(path, data)
    return path, Page(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ without a browser


@pytest.mark.parametrize("make", [scored, evaluated])
def test_the_page_holds_the_data_and_no_other_markup(tmp_path, make):
    _, plain = written(tmp_path, ReportData("nothing", {}, [], 0))
    _, page = written(tmp_path, make(30))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags], "data must not turn into markup"
    held = json.loads(page.text_of("script", id="data"))
    assert set(held) == {field.name for field in dataclasses.fields(ReportData)}
    assert [row["image"] for row in held["rows"]] == [row.image for row in make(30).rows]
    assert page.text_of("title") == make(30).title


def test_images_travel_as_they_are(tmp_path):
    _, page = written(tmp_path, scored(5))
    shown = json.loads(page.text_of("script", id="data"))["most_anomalous"][0]
    assert shown["original"].startswith("data:image/jpeg;base64,")
    assert shown["overlay"].startswith("data:image/png;base64,")
    assert base64.b64decode(shown["overlay"].split(",")[1]) == image_bytes("PNG", 200)


def test_nothing_is_loaded(tmp_path):
    path, page = written(tmp_path, scored(5))
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text
    )
    linked = [given.get("src") or given.get("href") for _, given in page.tags if "src" in given or "href" in given]
    assert linked == ["data:,"]
    policies = [given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'")


def test_what_json_has_no_word_for(tmp_path):
    rows = [ImageRow("bad\udcff.png", math.nan, 0.5, False)]
    _, page = written(tmp_path, ReportData("run \udcff", {"n": math.pi}, rows, 1, threshold=math.inf))
    held = json.loads(page.text_of("script", id="data"))
    assert held["threshold"] is None
    assert held["rows"][0] == {
        "image": "bad\udcff.png",
        "score": None,
        "p_value": 0.5,
        "is_anomalous": False,
        "kind": None,
    }


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_report(tmp_path / "missing" / "report.html", scored(1))


# --------------------------------------------------------------------------------------------- in a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

# Answers are written into the document, which the browser prints when all is done.
DRIVER = """
<script>{
const seen = {}, find = id => document.getElementById(id), all = words => [...document.querySelectorAll(words)];
const names = () => all("#rows td.name").map(cell => cell.textContent);
const tell = (id, kind) => find(id).dispatchEvent(new Event(kind));
const set = (id, value) => { find(id).value = value; tell(id, id === "search" ? "input" : "change"); };
const press = words => document.querySelector(words).click();
%s
document.documentElement.replaceChildren(document.createElement("body"));
document.body.append(JSON.stringify(seen));
}</script>
"""


def browse(path: Path, script: str) -> tuple[dict[str, object], list[str]]:
    """Run a script at the end of a page. Returns what it saw, and what the console says."""
    driven = path.with_name("driven.html")
    driven.write_text(
        path.read_text(encoding="utf-8").replace("</body>", DRIVER % script + "</body>"), encoding="utf-8"
    )
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            # It is to ask nobody for anything.
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(
                f"--user-data-dir={path.parent / 'profile'}",
                "--dump-dom",
                driven.as_uri(),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    body = Page(done.stdout).text_of("body")
    return json.loads(body), console


@needs_browser
def test_the_console_is_heard(tmp_path):
    path, _ = written(tmp_path, scored(3))
    _, console = browse(path, "console.error('heard'); queueMicrotask(() => missing());")
    assert any("heard" in line for line in console)
    assert any("missing" in line for line in console)


@needs_browser
def test_a_scored_run(tmp_path):
    path, _ = written(tmp_path, scored(30))
    seen, console = browse(
        path,
        """
        seen.text = document.body.innerText;
        seen.titles = all("h2").map(title => title.textContent);
        seen.drawn = all("svg path").length;
        seen.loaded = all("img").map(image => image.src.slice(0, 10));
        """,
    )
    assert console == []
    assert seen["titles"] == ["Image scores", "Most anomalous", "Least anomalous", "Depth profile", "All images"]
    for words in ("a run", "runs/one", "12.5", "set on clean images for 10", "threshold 0.9", "calibration"):
        assert words in seen["text"].replace("\xa0", " ")
    assert seen["drawn"] == 2
    assert seen["loaded"] == ["data:image"] * 10


@needs_browser
def test_an_evaluated_run_with_hostile_names(tmp_path):
    data = evaluated(60)
    path, _ = written(tmp_path, data)
    seen, console = browse(
        path,
        """
        seen.text = document.body.innerText;
        seen.titles = all("h2").map(title => title.textContent);
        seen.heading = document.querySelector("h1").textContent;
        seen.first = names()[0];
        seen.scripts = all("script").length;
        seen.pictures = all("img").length;
        seen.tiles = all(".tile h3").map(title => title.textContent);
        """,
    )
    assert console == []
    assert seen["heading"] == HOSTILE
    assert seen["first"] == HOSTILE
    assert seen["scripts"] == 3, "data, page and driver: none came out of a name"
    assert seen["pictures"] == 10
    assert {"Called anomalous", "Defects found", "False alarms"} <= set(seen["tiles"])
    assert {"Detection quality", "By kind of defect", "Curves"} <= set(seen["titles"])
    metric = data.metrics[0]
    for words in (
        f"{metric.value:.3f}",
        f"{metric.low:.3f} to {metric.high:.3f}",
        "crack",
        "0.750",
        "missed",
        "false alarm",
    ):
        assert words in seen["text"]


@needs_browser
def test_verdicts_keep_to_a_line_in_narrow_cards(tmp_path):
    """Else the picture below "false alarm" stands lower than its neighbours'."""
    path, _ = written(tmp_path, evaluated(60))
    seen, _ = browse(
        path,
        """
        all(".shots").forEach(grid => { grid.style.gridTemplateColumns = "repeat(auto-fill, 135px)"; });
        seen.names = all(".shot .pill").map(pill => pill.textContent);
        seen.heights = all(".shot .pill").map(pill => pill.offsetHeight);
        """,
    )
    assert "false alarm" in seen["names"]
    assert len(set(seen["heights"])) == 1


@needs_browser
def test_large_scores_stay_in_their_cards(tmp_path):
    data = evaluated(60)
    rows = [dataclasses.replace(row, score=1234567.8 if i % 2 else 123456.7) for i, row in enumerate(data.rows)]
    path, _ = written(tmp_path, dataclasses.replace(data, most_anomalous=[picture(row) for row in rows[:6]]))
    seen, _ = browse(
        path,
        """
        all(".shots").forEach(grid => { grid.style.gridTemplateColumns = "repeat(auto-fill, 135px)"; });
        const lines = all(".shot .line");
        seen.wide = lines.filter(line => line.scrollWidth > line.clientWidth).map(line => line.textContent);
        seen.scores = lines.slice(0, 2).map(line => line.firstChild.textContent);
        """,
    )
    assert seen == {"wide": [], "scores": ["123,457", "1.2e+6"]}


@needs_browser
def test_without_a_threshold_nothing_is_called_clean(tmp_path):
    data = dataclasses.replace(evaluated(60), threshold=math.inf)
    path, _ = written(tmp_path, data)
    seen, _ = browse(path, "seen.verdicts = [...new Set(all('.pill').map(pill => pill.textContent))];")
    assert seen["verdicts"] == ["undecided"]


@needs_browser
@pytest.mark.parametrize(("rate", "told"), [(0.0004, "0.04 %"), (0.0125, "1.25 %"), (1 / 11, "9.09 %"), (0.1, "10 %")])
def test_the_rate_that_was_asked_for_is_told_as_asked(tmp_path, rate, told):
    path, _ = written(tmp_path, dataclasses.replace(scored(30), false_alarm_rate=rate))
    seen, _ = browse(path, "seen.text = document.body.innerText; seen.share = [share(.0004), share(0), share(.256)];")
    assert f"set on clean images for {told} false alarms" in seen["text"].replace("\xa0", " ")
    assert [words.replace("\xa0", " ") for words in seen["share"]] == ["0.04 %", "0 %", "25.6 %"]


@needs_browser
def test_kinds_of_defects_sort_as_numbers(tmp_path):
    found, aurocs = [9, 10, 0], [0.9, None, 0.1]
    kinds = [
        DefectKind(kind, 10, count, {"Image AUROC": auroc})
        for kind, count, auroc in zip(["c/2", "c/10", "a"], found, aurocs, strict=True)
    ]
    path, _ = written(tmp_path, dataclasses.replace(evaluated(60), defects=kinds))
    seen, console = browse(
        path,
        """
        const kinds = () => all("#kinds tr").map(row => row.firstChild.textContent);
        seen.given = kinds();
        seen.counts = all("#kinds tr").map(row => row.children[1].textContent);
        for (const name of ["kind", "found", "metric-0"]) {
          press(`.kinds [data-sort=${name}]`);
          seen[name] = kinds();
        }
        press(".kinds [data-sort=metric-0]");
        seen.falling = kinds();
        """,
    )
    assert console == []
    assert seen["given"] == ["c/2", "c/10", "a"]
    assert seen["counts"] == ["9 of 10", "10 of 10", "0 of 10"]
    assert seen["kind"] == ["a", "c/2", "c/10"]
    assert seen["found"] == ["a", "c/2", "c/10"]
    assert seen["metric-0"] == ["a", "c/2", "c/10"], "what has no value comes last"
    assert seen["falling"] == ["c/2", "a", "c/10"], "what has no value comes last"


@needs_browser
def test_what_a_mouse_can_do_a_keyboard_can(tmp_path):
    path, _ = written(tmp_path, evaluated(60))
    seen, console = browse(
        path,
        """
        const focused = () => document.activeElement.getAttribute("aria-label");
        press("tr.known td.name button");
        seen.open = document.querySelector("dialog").open;
        const next = document.querySelector("dialog [aria-label='next image']");
        next.focus();
        next.click();
        seen.kept = focused();
        document.querySelector("dialog [aria-label=close]").click();
        seen.closed = !document.querySelector("dialog").open;
        seen.names = all(".shot").map(shot => shot.getAttribute("aria-label"));
        seen.texts = all(".shot .line").map(line => [...line.children, line.firstChild].map(part => part.textContent));
        """,
    )
    assert console == []
    assert (seen["open"], seen["kept"], seen["closed"]) == (True, "next image", True)
    for name, (verdict, score) in zip(seen["names"], seen["texts"], strict=True):
        assert name.endswith(f", score {score}, {verdict}"), "a reader of the screen hears what the card says"


@needs_browser
def test_mistakes_best_adapters_and_the_scale_of_the_maps(tmp_path):
    data = evaluated(60)
    adapters = [f"adapter-{i % 2}" for i in range(60)]
    scale = MapScale(1.25, 8.5, ["rgb(0 0 0)", "rgb(255 0 0)"])
    wrong = [picture(row) for row in data.rows if row.is_anomalous == (row.kind == "good")][:4]
    data = dataclasses.replace(data, mistakes=wrong, best_adapters=adapters, map_scale=scale)
    path, _ = written(tmp_path, data)
    seen, console = browse(
        path,
        """
        seen.titles = all("h2").map(title => title.textContent);
        seen.shown = all(".shots")[0].querySelectorAll(".pill.wrong").length;
        seen.scale = document.querySelector(".ramp").textContent;
        seen.colours = document.querySelector(".ramp i").style.background;
        seen.adapters = all("#rows tr").map(row => row.lastChild.textContent);
        """,
    )
    assert console == []
    assert seen["titles"].index("Mistakes") < seen["titles"].index("Most anomalous")
    assert seen["shown"] == len(wrong) == 4
    assert (seen["scale"], "rgb(255, 0, 0)" in seen["colours"]) == ("1.258.5", True)
    assert seen["adapters"] == adapters[:50]


@needs_browser
def test_sorting_filtering_and_paging(tmp_path):
    path, _ = written(tmp_path, evaluated(1000))
    seen, console = browse(
        path,
        """
        seen.took = performance.now();
        seen.inDocument = all("#rows tr").length;
        seen.hottest = names();
        seen.sorted = document.querySelector("th[aria-sort]").textContent;
        press("[data-sort=score]");
        seen.calmest = names();
        press("[data-sort=image]");
        seen.byName = names();
        press("#on");
        seen.second = names();
        seen.count = find("count").textContent;
        press("#back");
        seen.again = names();
        set("search", "IMAGE-00");
        seen.found = find("count").textContent;
        set("kind", "crack");
        seen.kinds = [...new Set(all("#rows tr").map(row => row.children[3].textContent))];
        set("verdict", "missed");
        seen.verdicts = [...new Set(all("#rows .pill").map(pill => pill.textContent))];
        set("search", "no such file");
        seen.none = find("count").textContent;
        """,
    )
    data = evaluated(1000)
    names = [row.image for row in data.rows]
    assert console == []
    assert seen["took"] < 5000, "milliseconds until a thousand images were there"
    assert seen["inDocument"] == 50
    assert (seen["hottest"], seen["sorted"]) == (names[:50], "Score")
    assert seen["calmest"] == names[::-1][:50]
    by_name = sorted(names[1:])
    assert seen["byName"][1:] == by_name[:49]
    assert seen["second"] == by_name[49:99]
    assert seen["count"] == "51 to 100 of 1,000"
    assert seen["again"] == seen["byName"]
    assert seen["found"] == f"1 to 50 of {sum('image-00' in name for name in names)}"
    assert seen["kinds"] == ["crack"]
    assert seen["verdicts"] == ["missed"]
    assert seen["none"] == "no image matches"


@needs_browser
def test_some_of_the_images_say_nothing_about_all(tmp_path):
    path, _ = written(tmp_path, dataclasses.replace(evaluated(60), num_images=12345))
    seen, _ = browse(
        path, "seen.tiles = all('.tile').map(tile => tile.innerText); seen.text = document.body.innerText;"
    )
    assert " ".join(seen["tiles"][0].split()) == "Images scored 12,345 60 of them on this page"
    assert not any(tile.startswith(("Called", "Defects", "False")) for tile in seen["tiles"])
    assert "60 of 12,345" in seen["text"]


@needs_browser
def test_a_picture_is_enlarged(tmp_path):
    data = scored(30)
    path, _ = written(tmp_path, data)
    seen, console = browse(
        path,
        """
        const shown = () => document.querySelector("dialog .name").textContent;
        const key = name => document.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
        press("tr.known");
        seen.open = document.querySelector("dialog").open;
        seen.first = shown();
        seen.blocks = all("dialog svg rect[rx]").length;
        key("ArrowRight");
        seen.next = shown();
        key("ArrowLeft");
        key("ArrowLeft");
        seen.last = shown();
        press("dialog [aria-label=close]");
        seen.closed = !document.querySelector("dialog").open;
        press(".switch button:last-child");
        seen.plain = all(".shots.plain").length;
        """,
    )
    assert console == []
    assert (seen["open"], seen["closed"], seen["blocks"], seen["plain"]) == (True, True, 3, 2)
    assert [seen["first"], seen["next"], seen["last"]] == [
        data.rows[0].image,
        data.rows[1].image,
        data.rows[-1].image,
    ]


@needs_browser
@pytest.mark.parametrize(
    "data",
    [
        ReportData("nothing", {}, [], 0),
        ReportData("one", {}, [ImageRow("a.png", 1.0, 1.0, False)], 5, threshold=math.inf, false_alarm_rate=0.01),
        ReportData("broken", {}, [ImageRow("a.png", math.nan, 1.0, False, "good")], 1, threshold=2.0),
        ReportData("bare", {}, [], 0, score_bars=ScoreBars(*plot_bins({"none": histogram([])})), blocks=["a"]),
    ],
    ids=lambda data: data.title,
)
def test_hardly_any_data(tmp_path, data):
    path, _ = written(tmp_path, data)
    seen, console = browse(
        path, "seen.ready = document.documentElement.dataset.ready; seen.text = document.body.innerText;"
    )
    assert console == []
    assert seen["ready"] == "true"
    assert ("too few clean images" in seen["text"]) == (data.title == "one")
    assert "NaN" not in seen["text"]


def test_the_title_names_the_run_also_from_inside_it(tmp_path, monkeypatch):
    (tmp_path / "road").mkdir()
    monkeypatch.chdir(tmp_path / "road")
    assert report._title(SimpleNamespace(run_dir=".", images_title="IMAGES")) == "road: IMAGES"


def test_the_bars_of_many_images_are_counted_many_at_once(tmp_path, monkeypatch):
    scores = [0.5, None, *np.random.default_rng(0).gamma(4, 1.5, 50).tolist()]
    rows = [{"image": "a", "score": score} for score in scores]
    write_rows(tmp_path, rows)
    detector = SimpleNamespace(images=SimpleNamespace(histogram=histogram([1.0, 2.0])))
    expected = ScoreBars(
        *plot_bins({"calibration": histogram([1.0, 2.0]), "images": histogram([s for s in scores if s])})
    )
    calls, update = [], ScoreHistogram.update
    monkeypatch.setattr("trajdist.scoring.histogram.CHUNK", 20)
    monkeypatch.setattr(ScoreHistogram, "update", lambda self, found: (calls.append(len(found)), update(self, found)))
    bars = report._bars(SimpleNamespace(scorer=SimpleNamespace(detectors=[detector]), out=tmp_path), None)
    assert calls == [20, 20, 11]
    assert bars.counts["images"].tolist() == expected.counts["images"].tolist()
    assert bars.counts["images"].sum() == 51
