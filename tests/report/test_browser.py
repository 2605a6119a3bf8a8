"""The report's page in a real Chromium: by keyboard alone, in both themes, on narrow screens, with hostile names."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from shoal.jobs.report import Asked, report
from tests.support.finished import SIZES, finished, measured, with_networks

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

WHITE, DARK = 0xFFFFFF, 0x14191E
RUNS = {"small": (400, 80.0), "middle": (1500, 88.0), "worse": (2000, 85.0), "large": (6000, 91.0)}
HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'<"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four budgets on digits, one of them with two seeds, and of one run on CIFAR-100."""
    folder = tmp_path_factory.mktemp("report")
    runs = [finished(folder / name, relus, accuracy, options=relus) for name, (relus, accuracy) in RUNS.items()]
    measured(with_networks(runs[0]))
    with_networks(runs[1])
    runs.append(with_networks(finished(folder / "again", 1500, 89.0, seed=1, options=1500)))
    runs.append(finished(folder / "hundred", 9000, 70.0, data="cifar100"))
    report(runs, Asked(html=folder / "report.html"))
    return folder / "report.html"


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page on digits; it must have asked for nothing but itself, and have said nothing on the console."""
    with opened(browser, file) as found:
        found.select_option("#dataset", "digits")
        yield found


@contextmanager
def opened(browser: Any, file: Path, expected: str | None = None, **window: Any) -> Iterator[Any]:
    """A page in a window of its own, which must ask for nothing but itself and complain of `expected` alone."""
    page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"} | window)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert [expected is not None and expected in text for text in complaints] == ([] if expected is None else [True])
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]


def best(page: Any) -> str:
    return str(page.locator("#budget-best").inner_text())


def kept(page: Any) -> list[str]:
    return [str(text) for text in page.locator("#sites-table td:nth-child(3)").all_text_contents()]


@pytest.mark.slow
def test_slider_by_keyboard_shows_the_best_run_within_the_budget(page: Any) -> None:
    page.locator("#budget").focus()
    page.keyboard.press("Home")
    assert "At most 400 ReLUs." in best(page)
    assert "small: 80.00 % with 400 ReLUs" in best(page)
    small = kept(page)
    page.keyboard.press("End")
    assert "large: 91.00 % with 6,000 ReLUs" in best(page)
    assert kept(page) != small
    assert len(kept(page)) == len(SIZES)
    assert "block replaced" in kept(page)
    seen = []
    for key in ["ArrowLeft"] * 5 + ["PageDown"] * 10:
        page.keyboard.press(key)
        seen.append(best(page).partition(". ")[2])
    names = list(dict.fromkeys(seen))
    assert [name.partition(":")[0].rpartition("/")[2] for name in names] == ["middle and another seed", "small"]
    assert page.locator("#front-chart [aria-selected=true]").count() == 1


def test_budget_may_be_typed(page: Any) -> None:
    page.locator("#budget-number").fill("2500")
    page.keyboard.press("Tab")
    assert "88.50 % with 1,500 ReLUs" in best(page)  # 2,000 ReLUs of "worse" are more and less accurate
    page.locator("#budget-number").fill("3")
    page.keyboard.press("Tab")
    assert best(page) == "At most 3 ReLUs. No run has so few ReLUs."
    assert page.locator("#front-chart [aria-selected=true]").count() == 0


def test_points_by_keyboard(page: Any) -> None:
    start = page.locator("#front-chart [tabindex='0']")
    assert start.count() == 1
    start.focus()
    tips = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "End"):
        page.keyboard.press(key)
        tips.append(page.locator(".tip").inner_text())
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == tips[-1].replace("\n", ", ")
    assert [tip.split("\n")[0].rpartition("/")[2] for tip in tips[:4]] == [
        "small",
        "middle and another seed",
        "worse",
        "large",
    ]
    assert "± 0.71 over 2 seeds" in tips[1]
    assert "all ReLUs" in tips[4]
    page.keyboard.press("Escape")
    assert page.locator(".tip").count() == 0
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.locator("#run option:checked").inner_text().endswith("small")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"


def test_axes_and_scales(page: Any) -> None:
    shown = {}
    for axis in ("relus", "macs", "waits", "online_s"):
        page.select_option("#axis", axis)
        shown[axis] = page.locator("#front-chart [role=option]").count()
        steps = page.locator("#front-chart .step").evaluate_all(
            "all => all.map(e => getComputedStyle(e).strokeDasharray)"
        )
        assert len(steps) == len(set(steps)) == (2 if axis == "online_s" else 1)  # measured and forecast look different
    assert shown == {"relus": 5, "macs": 5, "waits": 3, "online_s": 3}
    assert "2 of 5 networks have no figure" in page.locator("#front-note").inner_text()
    assert page.locator("#front-chart .hollow").count() == 2  # "small" alone is measured with all its seeds
    named = page.locator("#legend").inner_text()
    assert "front of measured seconds" in named
    assert "front of forecast seconds" in named
    page.select_option("#axis", "relus")
    places = []
    for _ in range(2):
        page.locator("#log").press("Space")
        places.append(page.locator("#front-chart .step").get_attribute("d"))
    assert places[0] != places[1]


def test_papers_points_of_other_data_are_off_until_asked_for(page: Any) -> None:
    assert page.locator("#papers-choice input:checked").count() == 0
    own = page.locator("#front-chart [role=option]").count()
    page.locator("#papers-choice input[value='tiny-imagenet']").press("Space")
    assert page.locator("#front-chart [role=option]").count() > own + 20
    assert "other data than ours" in page.locator("#front-note").inner_text()
    page.select_option("#dataset", "cifar100")
    assert page.locator("#papers-choice input:checked").evaluate_all("all => all.map(box => box.value)") == ["cifar100"]
    assert "trained differently" in page.locator("#front-note").inner_text()


def test_table_sorts_by_keyboard(page: Any) -> None:
    column = page.locator("#runs-table th").all_text_contents().index("ReLUs: reduced")
    heading, cells = page.locator("#runs-table th").nth(column), page.locator(f"#runs-table td:nth-child({column + 1})")
    heading.locator("button").focus()
    for order, down in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")
        values = [int(text.replace(",", "")) for text in cells.all_text_contents()]
        assert values == sorted(values, reverse=down)
        assert heading.get_attribute("aria-sort") == order


def test_everything_is_reached_by_tab_and_seen_in_focus(page: Any) -> None:
    reached = {}
    for _ in range(80):
        page.keyboard.press("Tab")
        reached |= page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e), ring = e.querySelector('.ring');
            const seen = ring ? getComputedStyle(ring).visibility === 'visible' : s.outlineStyle !== 'none';
            return { [e.id || e.getAttribute('role') || e.tagName]: seen }; }"""
        )
    saves = {f"{part}-{kind}" for part in ("front", "sites", "curves") for kind in ("svg", "png")}
    controls = saves | {
        "data-csv",
        "data-json",
        "theme",
        "dataset",
        "axis",
        "log",
        "option",
        "budget",
        "budget-number",
        "run",
        "sites-log",
    }
    assert controls | {"SUMMARY", "BUTTON", "region"} <= set(reached)
    assert [name for name, seen in reached.items() if not seen and name != "BODY"] == []
    assert page.locator("input, select, button").evaluate_all("all => all.filter(e => e.tabIndex < 0).length") == 0
    unnamed = "all => all.filter(e => !e.labels.length).length"
    assert page.locator("input, select").evaluate_all(unnamed) == 0


def picture(page: Any) -> np.ndarray:
    """What is seen, as one number a pixel."""
    return np.asarray(Image.open(BytesIO(page.screenshot())).convert("RGB")).astype(int) @ (65_536, 256, 1)


def test_both_themes_are_drawn(page: Any) -> None:
    light = picture(page)
    page.locator("#theme").press("Enter")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    dark = picture(page)
    for pixels, background in ((light, WHITE), (dark, DARK)):
        share = float((pixels == background).mean())
        assert 0.5 < share < 0.97  # neither blank nor another theme's
        assert len(np.unique(pixels)) > 100
    page.locator("#theme").press("Enter")
    assert float((picture(page) == WHITE).mean()) > 0.5


def test_dark_by_the_system_s_setting(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="dark") as page:
        assert float((picture(page) == DARK).mean()) > 0.5
        assert page.locator("#theme").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("width", [320, 360, 768])
def test_narrow_screens_do_not_scroll_sideways(width: int, browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": width, "height": 800}) as page:
        page.locator("details").evaluate_all("all => all.forEach(part => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Charts are drawn anew when the window changes: their text keeps its size.
        page.set_viewport_size({"width": 2 * width, "height": 800})
        page.wait_for_function("document.querySelector('#front-chart svg').viewBox.baseVal.width > innerWidth * 0.7")


def downloaded(page: Any, button: str) -> bytes:
    with page.expect_download() as found:
        page.locator(f"#{button}").press("Enter")
    return Path(found.value.path()).read_bytes()


def test_data_can_be_saved(page: Any, file: Path) -> None:
    data = json.loads(downloaded(page, "data-json"))
    assert {"points", "fronts", "runs", "rows", "papers"} <= data.keys()
    text = downloaded(page, "data-csv").decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["run"] for row in rows] == [run["name"] for run in data["runs"]]
    for row, stored in zip(rows, data["rows"], strict=True):
        assert row.keys() == stored.keys()
        for key, value in stored.items():
            cell: object = float(row[key]) if isinstance(value, (int, float)) else row[key] or None
            assert cell == value


def test_charts_can_be_saved_as_pictures(page: Any) -> None:
    page.select_option("#axis", "online_s")
    for name in ("front", "sites", "curves"):
        vector = ElementTree.fromstring(downloaded(page, f"{name}-svg"))
        size = [float(vector.get(key, "0")) for key in ("width", "height")]
        words = [text for element in vector.iter() if (text := element.text)]
        assert {"front": "front of forecast seconds", "sites": "block replaced", "curves": "finetune"}[name] in words
        assert not [e for e in vector.iter() if "var(" in str(e.attrib) or "class" in e.attrib]
        drawn = Image.open(BytesIO(downloaded(page, f"{name}-png"))).convert("RGB")
        assert drawn.size == tuple(2 * int(side) for side in size)
        assert len(drawn.getcolors(1 << 24) or []) > 20  # a chart, and not a blank page


def test_labels_are_whole_and_apart_on_a_phone(browser: Any, file: Path) -> None:
    """Labels of controls are on one line, and texts of a chart do not overlap."""
    with opened(browser, file, viewport={"width": 390, "height": 800}) as page:
        page.select_option("#dataset", "digits")
        for axis in ("relus", "macs", "waits", "online_s"):
            page.select_option("#axis", axis)
            assert page.evaluate(OVERLAPS) == []
        page.locator("#log").press("Space")
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(BROKEN) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


OVERLAPS = """() => ['#front-chart', '#sites-chart', '#curves-chart'].flatMap((id) => {
  const texts = [...document.querySelectorAll(`${id} text`)].map((e) => [e.textContent, e.getBoundingClientRect()]);
  const over = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const hits = (a, i) => texts.slice(i + 1).filter(([, b]) => over(a, b)).map(([other]) => other);
  return texts.flatMap(([name, a], i) => hits(a, i).map((other) => [name, other]));
})"""
BROKEN = """() => [...document.querySelectorAll('label, button, dt')].filter((e) => {
  const range = document.createRange(), text = [...e.childNodes].find((n) => n.nodeType === 3 && n.textContent.trim());
  if (!text || !e.getClientRects().length || e.closest('table')) return false;
  range.selectNodeContents(text);
  return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1;
}).map((e) => e.textContent)"""


def test_print_leaves_controls_out_and_is_on_white(page: Any) -> None:
    page.locator("#theme").press("Enter")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#theme").is_visible()
    assert page.locator("#runs-table").is_visible()


@pytest.mark.slow
def test_hostile_names_are_text_and_injected_scripts_do_not_run(browser: Any, tmp_path: Path) -> None:
    run = finished(tmp_path / HOSTILE.replace("/", ""), 500, 90.0, data=HOSTILE)
    report([run], Asked(html=tmp_path / "report.html"))
    with opened(browser, tmp_path / "report.html") as page:
        assert page.title() == "shoal: report of runs"
        assert page.locator("img").count() == 0
        assert page.locator("#run option").inner_text() == str(run)
        assert page.locator("#dataset option").inner_text() == HOSTILE
    text = (tmp_path / "report.html").read_text()
    injected = text.replace("<main", "<script>document.title = 'run'</script><main")
    (tmp_path / "report.html").write_text(injected)
    with opened(browser, tmp_path / "report.html", "Content Security Policy") as page:
        assert page.title() == "shoal: report of runs"
