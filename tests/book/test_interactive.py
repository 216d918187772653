"""The two pages to play with: whole without JavaScript, and what they do in a browser."""

import json
import re

import pandas as pd
import pytest
from chromium import PROGRAM, chromium
from divmerge_book.figures import baselines, landscapes, title
from divmerge_book.figures.styles import style
from divmerge_book.runner import interactive_pages
from helpers import RESULTS
from matplotlib.colors import to_hex

SCRIPT = RESULTS.parent / "_static" / "interactive.js"
PLACES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
without_one = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
in_a_browser = [pytest.mark.browser, without_one]


@pytest.fixture
def summary() -> pd.DataFrame:
    """Four methods: two without data, one of them with several models, one without seconds."""
    names = ["ties", "emr", "divmerge/layer", "fisher"]
    table = pd.DataFrame({"value": [0.9, 0.95, 0.92, 0.5], "seconds": [1, 2, 30, None]}, names)
    table["block"] = [baselines.block(name) for name in names]
    return table.assign(kept=0.1, worst=0.2, peak_bytes=3e6, stored=1.0, inputs=0)


@pytest.fixture
def data() -> dict:
    """A plane on which every measure says where it was taken."""
    facts = {"pair": "a+b", "experts": [1.0, 1.0], "majorities": [0.5, 0.5]}
    points = [(i, j) for i in PLACES for j in PLACES]
    grid = pd.DataFrame(
        {"l1": i, "l2": j, "js": i + j / 10, "anp": 0.5, "accuracies": [i, j], **facts}
        for i, j in points[::-1]
    )
    point = {**grid.iloc[0], "step": 0, "l1": 0.4, "l2": 0.6}
    marks = pd.DataFrame({**point, "method": name} for name in landscapes.MARKS)
    return interactive_pages.plane_data(grid, marks)


def test_the_table_has_every_number_in_its_html(summary):
    table = interactive_pages.methods_table(summary)
    assert table.count("<tr ") == 4
    assert '<a href="../methods/ties.html">TIES</a>' in table
    assert '<td data-value="0.95">95.0</td>' in table and '<td data-value=""></td>' in table
    assert 'data-data="unlabelled inputs" data-seconds="30" data-models="1"' in table


def test_the_plane_is_in_the_order_of_its_axes_with_the_books_marks(data):
    assert data["axis"] == PLACES and data["tasks"] == ["a", "b"]
    objective, anp, kept, first, second = data["measures"].values()
    assert objective[3][1] == pytest.approx(0.62) and anp[3][1] == 50
    assert first[3][1] == 60 and second[3][1] == 20 and kept[3][1] == pytest.approx(-20)
    looks = {one["title"]: (one["colour"], one["marker"]) for one in data["methods"]}
    expected = {title(m): (to_hex(style(m)["color"]), style(m)["marker"]) for m in landscapes.MARKS}
    assert looks == expected
    known = re.search(r"const MARKERS = {(.*?)};", SCRIPT.read_text(), re.S)[1]
    for _, marker in looks.values():
        assert re.search(rf'(^|\s)"?{re.escape(marker)}"?:', known), f"no shape for {marker}"


def test_the_stored_planes_hold_each_measured_number(tmp_path):
    (tmp_path / "interference").symlink_to(RESULTS / "interference")
    page = interactive_pages.plane_page(tmp_path)
    assert (tmp_path / "plane.svg").stat().st_size > 10_000 and page.count("tored run") == 1
    (found,) = re.findall(r'<script type="application/json">(.*)</script>', page)
    grid = interactive_pages.stored_tables.load(RESULTS / interactive_pages.PLANES)[0]["grid"]
    for pair, plane in json.loads(found).items():
        row = grid[grid.pair == pair].iloc[37]
        i, j = plane["axis"].index(row.l1), plane["axis"].index(row.l2)
        assert plane["measures"]["objective, nats"][i][j] == pytest.approx(row.js, abs=1e-4)


@pytest.fixture
def page(tmp_path, request):
    """A browser with a page that holds the given HTML and the script."""
    body = request.getfixturevalue("body")
    file = tmp_path / "page.html"
    file.write_text(f'<meta charset="utf-8">{body}<script src="file://{SCRIPT}"></script>', "utf-8")
    with chromium(tmp_path / "profile") as found:
        found.window(1000)
        found.open(f"file://{file}")
        yield found
        assert found.problems == []


class TestTable:
    pytestmark = in_a_browser

    @pytest.fixture
    def body(self, summary) -> str:
        return interactive_pages.methods_table(summary)

    def names(self, page) -> list[str]:
        rows = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden)"
        return page.run(f"{rows}.map(r => r.cells[0].textContent)")

    def click(self, page, head: str) -> None:
        heads = "[...document.querySelectorAll('thead button')]"
        page.run(f"{heads}.find(b => b.textContent.startsWith('{head}')).click()")

    def test_a_click_sorts_the_better_first_and_a_second_turns_it_round(self, page):
        self.click(page, "ANP")
        best = ["EMR-Merging", "DivMerge, per layer", "TIES", "Fisher merging"]
        assert self.names(page) == best
        self.click(page, "ANP")
        assert self.names(page) == best[::-1]
        self.click(page, "merge")  # seconds: the smallest first, and what has none last
        assert self.names(page) == ["TIES", "EMR-Merging", "DivMerge, per layer", "Fisher merging"]
        self.click(page, "merge")
        assert self.names(page)[-1] == "Fisher merging"

    def test_filters_leave_out_by_data_seconds_and_models(self, page):
        def give(field: str, what: str) -> list[str]:
            page.run(f"{{const f = document.querySelector('form {field}'); {what};"
                     "f.dispatchEvent(new Event('input', {bubbles: true}))}")  # fmt: skip
            return self.names(page)

        assert give("select", "f.value = 'no data'") == ["TIES", "EMR-Merging"]
        assert give("[type=checkbox]", "f.checked = true") == ["TIES"]
        give("select", "f.value = ''")
        assert give("[type=number]", "f.value = 5") == ["TIES"]
        assert page.run("document.querySelector('output').textContent") == "1 of 4 methods"


class TestPlane:
    pytestmark = in_a_browser

    @pytest.fixture
    def body(self, data) -> str:
        inside = f'<script type="application/json">{json.dumps({"a+b": data})}</script>'
        return f'<figure class="static">figure</figure><div class="plane">{inside}</div>'

    def readings(self, page, row: int = 0) -> list[str]:
        cells = f"document.querySelectorAll('.readings tbody tr')[{row}].querySelectorAll('td')"
        return page.run(f"[...{cells}].map(c => c.textContent)")

    def test_a_drag_reads_the_square_under_the_mouse(self, page):
        box = page.run("(({x, y, width}) => [x, y, width])"
                       "(document.querySelector('svg.plane').getBoundingClientRect())")  # fmt: skip
        x, y, width = box

        def at(i: int, j: int) -> tuple[float, float]:
            return x + width * (i + 0.5) / 6, y + width * (5.5 - j) / 6

        page.drag(at(0, 0), at(3, 1))
        assert self.readings(page) == ["0.60", "0.20", "0.6200", "50.0", "-20.0", "60.0", "20.0"]
        page.drag(at(3, 1), (x + 10 * width, y + 0.5))  # out of the plane: its edge
        assert self.readings(page)[:2] == ["1.00", "1.00"]
        assert page.run("document.querySelector('.static').hidden")

    def test_the_sliders_move_the_point_and_the_methods_ends_stand_below(self, page):
        page.run("{const s = document.querySelectorAll('[type=range]')[1]; s.value = 5;"
                 "s.dispatchEvent(new Event('input', {bubbles: true}))}")  # fmt: skip
        assert self.readings(page)[:2] == ["0.60", "1.00"]
        assert self.readings(page, row=4)[:2] == ["0.40", "0.60"]
