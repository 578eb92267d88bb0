"""`make report`: the executed notebooks as pages that a browser shows without a server and without the net."""

import re
import subprocess
import sys

import nbformat
import pytest

import utils
from tests.conftest import assert_one_clear_line

EXECUTED = utils.RESULTS / "notebooks"
NAMES = ["index", *sorted(path.stem for path in EXECUTED.glob("*.ipynb"))]
PAGES = [*NAMES, "model_card"]
READ_PAGE = """() => ({
    width: document.documentElement.scrollWidth,
    pictures: [...document.images].map(image => ({
        name: image.src, alt: image.alt, width: image.complete ? image.naturalWidth : 0, shown: image.offsetWidth
    })),
    links: [...document.links].map(link => link.href),
    names: [...document.querySelectorAll('[id]')].map(tag => tag.id),
    open: [...document.querySelectorAll('main details[open]')].map(tag => tag.innerText),
    folded: document.querySelectorAll('main details:not([open])').length,
    contents: [...document.querySelectorAll('nav li')].map(item => item.checkVisibility({contentVisibilityAuto: true})),
})"""


def write_report(output, *arguments):
    """Write the report with tools/report.py; return the finished process with its text."""
    command = [sys.executable, utils.ROOT / "tools" / "report.py", "--output", output, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    process = write_report(folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"open {folder / 'index.html'} in a browser\n" and not process.stderr
    return folder


@pytest.fixture
def open_page(browser):
    """Open a page of a site as a person would, from the disk; return what is on it, its requests and complaints."""
    pages = []

    def open_it(path, width):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", lambda request: complaints.append(f"{request.url} failed"))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri(), timeout=0)  # pytest-timeout ends it
        return page.evaluate(READ_PAGE) | {"requests": requests, "complaints": complaints}

    yield open_it
    for page in pages:
        page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_a_page_whole(site, open_page, name):
    wide, narrow = [open_page(site / f"{name}.html", width) for width in (1200, 390)]
    for width, page in ((1200, wide), (390, narrow)):
        assert page["complaints"] == []
        assert all(url.startswith(site.as_uri()) for url in page["requests"])
        assert page["width"] == width  # nothing is scrolled sideways but boxes of their own
        for picture in page["pictures"]:
            assert picture["width"] > 0 and picture["shown"] > 100, picture
            assert len(picture["alt"]) > 10 and "No description" not in picture["alt"], picture
    for link in wide["links"]:
        path, _, section = link.partition("#")
        assert path.startswith(("https://", site.as_uri())), link
        if path.startswith("file:"):
            assert (site / path.removeprefix(f"{site.as_uri()}/")).is_file(), link
        if section:
            assert path == (site / f"{name}.html").as_uri() and section in wide["names"]
    assert wide["contents"] and all(wide["contents"]) and not any(narrow["contents"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_page_has_every_figure_and_folds_the_code(site, open_page, name):
    cells = nbformat.read(EXECUTED / f"{name}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    figures = [
        output for cell in code for output in cell.outputs if {"image/png", "image/jpeg"} & {*output.get("data", {})}
    ]
    page = open_page(site / f"{name}.html", 1200)
    assert len(page["pictures"]) >= len(figures)
    assert len(page["open"]) + page["folded"] == len(code)
    parameters = [cell for cell in code if {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", [])}]
    assert len(page["open"]) == len(parameters) and all(": " in text or "=" in text for text in page["open"])


def test_the_first_page_has_the_readme_results_and_leads_everywhere(site, open_page):
    page = open_page(site / "index.html", 1200)
    readme, html = (utils.ROOT / "README.md").read_text(), (site / "index.html").read_text()
    table = re.search(r"<!-- results.*?-->\n(.*?)<!-- end of results -->", readme, re.DOTALL)[1]
    for figure in re.findall(r"\| ([^|]+) \|\n", table)[1:]:
        assert f"<td>{figure}</td>" in html
    assert {(site / f"{name}.html").as_uri() for name in PAGES} <= {*page["links"]}
    words = [alt.split() for alt in re.findall(r"!\[([^\]]*)\]\((?!http)", readme)]
    assert [picture["alt"].split() for picture in page["pictures"]] == words


def write_notebook(folder, text):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, folder / "tried.ipynb")
    return "--notebooks", folder


def test_a_page_asks_for_nothing_from_elsewhere_and_its_links_lead_somewhere(open_page, tmp_path):
    text = """# Tried
![a badge](https://example.org/badge.svg) [Keras](https://keras.io/) [code](../utils.py) [itself](../tried.ipynb#Tried)
[all](../results/notebooks) [README](../README.md)"""
    process = write_report(tmp_path / "report", *write_notebook(tmp_path, text))
    assert process.returncode == 0, process.stderr
    page = open_page(tmp_path / "report" / "tried.html", 390)
    assert page["complaints"] == [] and page["pictures"] == []
    assert all(url.startswith("file:") for url in page["requests"])
    site = (tmp_path / "report").as_uri()
    expected = ["https://keras.io/", f"{site}/files/utils.py", f"{site}/tried.html#Tried", f"{site}/index.html"]
    assert page["links"][-4:] == expected
    assert (tmp_path / "report" / "files" / "utils.py").read_bytes() == (utils.ROOT / "utils.py").read_bytes()


@pytest.mark.parametrize("link", ["gone.ipynb", "../../../../../../etc/passwd"])
def test_a_link_to_nothing_is_told(tmp_path, link):
    process = write_report(tmp_path / "report", *write_notebook(tmp_path, f"# Tried\n\n[there]({link})"))
    assert_one_clear_line(process, "tried", link)
    assert not (tmp_path / "report").exists()


def test_without_executed_notebooks_it_says_what_to_do(tmp_path):
    assert_one_clear_line(write_report(tmp_path / "report", "--notebooks", tmp_path), "make notebooks")
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    assert_one_clear_line(write_report(tmp_path / "report", "--notebooks", tmp_path), "half.ipynb")
    assert not (tmp_path / "report").exists()
