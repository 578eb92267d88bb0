"""Write the executed notebooks as one static site: `make report`, or `python tools/report.py`.

results/report/index.html opens in a browser without a server, and no page asks for anything from elsewhere. Every
notebook is a page with folded code and a list of its sections. The first page has the README's results and pictures.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))

import utils  # noqa: E402 (its folder is on sys.path from here on)

README, CARD = utils.ROOT / "README.md", utils.RESULTS / "model" / "README.md"
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def read_index(titles):
    """Return markdown for the first page: the README's opening and results, the notebooks, and the README's pictures.

    Args:
        titles: dict from the name of a page to its title, in reading order.

    Raises:
        utils.InputError: the README has no table between its two comments about results.
    """
    text = README.read_text()
    results = re.search(r"<!-- results.*?-->\n(.*?)<!-- end of results -->", text, re.DOTALL)
    if not results:
        raise utils.InputError("README.md has no results; expected <!-- results: ... --> and <!-- end of results -->")
    opening, rest = text.split("\n## ", 1)
    rows = "\n".join(f"| [{name}]({name}.html) | {title} |" for name, title in titles.items())
    pages = f"| page | tells |\n|---|---|\n{rows}"
    pictures = "\n\n".join(re.findall(r"!\[[^\]]*\]\([^)]+\)", rest))
    return f"{opening}\n\n## Results\n\n{results[1]}\n## Pages\n\n{pages}\n\n## Pictures\n\n{pictures}\n"


def read_sources(folder):
    """Return the pages but the first: a dict from name to (folder that its links start from, notebook).

    Raises:
        utils.InputError: there is no executed notebook in `folder`, or one is none.
    """
    sources = {}
    for path in sorted(folder.glob("*.ipynb")):
        try:
            sources[path.stem] = folder, nbformat.read(path, as_version=4)
        except (ValueError, nbformat.ValidationError) as error:
            raise utils.InputError(f"{utils.show_path(path)} is no notebook: {error}") from None
    if not sources:
        raise utils.InputError(f"no executed notebook in {utils.show_path(folder)}; run `make notebooks` first")
    if CARD.is_file():
        card = re.sub(r"\A---\n.*?\n---\n", "", CARD.read_text(), flags=re.DOTALL)  # what model hubs read
        sources["model_card"] = CARD.parent, markdown_notebook(card)
    return sources


def markdown_notebook(text):
    """Return text as a notebook with one cell, so that one template serves all pages."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])


def read_title(notebook):
    """Return the first heading of a notebook, without its marks, or "" where there is none."""
    headings = HEADING.findall("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    return headings[0] if headings else ""


def name_figures(notebook):
    """Give the code cells an alternative text for figures that bring none: the section that they are in."""
    section = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = ([section] + HEADING.findall(cell.source))[-1]
        else:
            cell.metadata.setdefault("alt", f"Figure of the section: {section}")


def mend_links(soup, name, folder, pages):
    """Point the links of a page to the pages and files of the site, and return those files.

    A notebook becomes its page, any other file a copy in files/, and a folder, which has no page, its words. A picture
    from elsewhere would be a request, so its words stand for it.

    Args:
        soup: the page, changed in place.
        name: of the page.
        folder: Path that its links start from.
        pages: names of all pages.

    Returns:
        dict from the path in the site to the Path of the file.

    Raises:
        utils.InputError: a link leads to nothing, or out of the project.
    """
    files = {}
    for tag in soup.select(".text_cell_render :is([href], [src])"):
        attribute = "href" if "href" in tag.attrs else "src"
        url = urlsplit(tag[attribute])
        if (url.scheme or url.netloc) and tag.name == "img" and url.scheme != "data":
            tag.replace_with(tag.get("alt", ""))
        if url.scheme or url.netloc or not url.path:
            continue
        # A notebook is written in notebooks/; its executed copy, whose links are these, is elsewhere.
        paths = [Path(os.path.normpath(start / unquote(url.path))) for start in (folder, utils.ROOT / "notebooks")]
        path = next(filter(Path.exists, paths), paths[0])
        if path.suffix in (".ipynb", ".html") and path.stem in pages:
            tag[attribute] = f"{path.stem}.html" + (f"#{url.fragment}" if url.fragment else "")
        elif path in (README, CARD) and (path == README or CARD.is_file()):
            tag[attribute] = "index.html" if path == README else "model_card.html"
        elif path.is_dir():
            tag.unwrap()
        elif path.is_file() and path.is_relative_to(utils.ROOT):
            shown = path.relative_to(utils.ROOT).as_posix()
            tag[attribute] = f"files/{shown}"
            files[tag[attribute]] = path
        else:
            raise utils.InputError(f"{name} links to {tag[attribute]}; expected a notebook or file that is there")
    return files


def list_sections(soup):
    """Put the headings of a page into its list of contents."""
    contents = soup.new_tag("ul")
    for heading in soup.select("main :is(h2, h3)[id]"):
        link = soup.new_tag("a", href=f"#{heading['id']}")
        link.string = heading.get_text().removesuffix("¶")
        item = soup.new_tag("li", attrs={"class": heading.name})
        item.append(link)
        contents.append(item)
    soup.nav.details.append(contents)


def write_site(sources, output):
    """Write all pages, their pictures, and the files that they link to, into `output`.

    Everything is made before the first file is written.

    Args:
        sources: as `read_sources` returns them.
        output: Path of the folder, made if need be.
    """
    titles = {name: read_title(notebook) for name, (_, notebook) in sources.items()}
    pages = {"index": (utils.ROOT, markdown_notebook(read_index(titles)))} | sources
    exporter = HTMLExporter(
        template_name="classic",
        template_file=str(TOOLS / "report.html.j2"),
        config=Config(ExtractOutputPreprocessor={"enabled": True}, CoalesceStreamsPreprocessor={"enabled": True}),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    files = {"style.css": f"{(TOOLS / 'report.css').read_text()}\n{HtmlFormatter().get_style_defs('.highlight')}\n"}
    for name, (folder, notebook) in pages.items():
        name_figures(notebook)
        resources = {"title": read_title(notebook), "pages": list(sources), "unique_key": name}
        html, resources = exporter.from_notebook_node(notebook, resources | {"output_files_dir": "figures"})
        soup = BeautifulSoup(html, "html.parser")
        files |= resources["outputs"] | mend_links(soup, name, folder, pages)
        list_sections(soup)
        for picture in soup.select("main img"):  # a click shows it in its full size
            picture.wrap(soup.new_tag("a", href=picture["src"]))
        files[f"{name}.html"] = str(soup)
    for name, content in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            content = content.read_bytes()
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def parse_args(argv=None):
    """Parse the command line, `sys.argv[1:]` unless `argv` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notebooks", default="", help="folder of executed notebooks; empty for results/notebooks")
    parser.add_argument("--output", default="", help="folder for the site; empty for results/report")
    return parser.parse_args(argv)


def main(notebooks, output):
    output = Path(output) if output else utils.RESULTS / "report"
    write_site(read_sources(Path(notebooks).resolve() if notebooks else utils.RESULTS / "notebooks"), output)
    print(f"open {utils.show_path(output / 'index.html')} in a browser")


if __name__ == "__main__":
    utils.run_script(main, parse_args)
