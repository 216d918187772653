"""Every page of the built book in a browser: wide and narrow, light and dark.

`make test-pages` builds the pages at size smoke, fetches axe-core and runs this.
"""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import PROGRAM, chromium

BUILD = Path(__file__).resolve().parents[2] / "_build"
HTML = BUILD / "html"
AXE = BUILD / "axe" / "node_modules" / "axe-core" / "axe.min.js"
SKIPPED = {"genindex.html", "search.html"}  # written by Sphinx, not by us
PAGES = sorted(
    str(path.relative_to(HTML))
    for path in HTML.rglob("*.html")
    if path.name not in SKIPPED and path.parent.name != "_static"  # parts of the theme
)
WIDTHS = {"desktop": 1300, "phone": 390}
CHECKS = """(async () => {
  const found = await axe.run(document, {resultTypes: ["violations"]});
  return found.violations
    .filter(one => ["serious", "critical"].includes(one.impact))
    .map(({id, nodes}) => [id, ...nodes.slice(0, 2).map(one => one.html.slice(0, 99))].join(" | "));
})()"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
WITHOUT_ALT = """[...document.querySelectorAll(".bd-content img")]
  .filter(one => !one.alt || /^[.\\/_\\w-]+\\.(svg|png)$/.test(one.alt)).map(one => one.src)"""
DARK = "document.documentElement.dataset.theme = document.documentElement.dataset.mode = '{}'"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium"),
    pytest.mark.skipif(not (PAGES and AXE.is_file()), reason="run `make test-pages`"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site():
    """The address of the pages on a server of their own: fonts do not load from files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=HTML)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_accessible_fits_its_window_and_says_nothing_to_the_console(browser, site, name):
    browser.problems.clear()
    browser.open(f"{site}/{name}")
    browser.run(AXE.read_text("utf-8") + "; 0")
    assert browser.run(WITHOUT_ALT) == []
    for window, width in WIDTHS.items():
        browser.window(width)
        for theme in ("light", "dark"):
            browser.run(DARK.format(theme))
            assert browser.run(CHECKS) == [], f"{window}, {theme}"
        assert browser.run(OVERFLOW) <= 0, f"{window}: the page is wider than its window"
    assert browser.problems == []
