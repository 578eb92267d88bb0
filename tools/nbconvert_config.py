"""Export notebooks/ to scripts/: `python -m nbconvert --config tools/nbconvert_config.py`.

A notebook with `"export": "train.py"` in its metadata becomes scripts/train.py: its `parameters` cell the command line,
its `export` cells the imports and definitions, its `main` cells the body of `main()`, laid out by script.py.j2. A
parameter that no `main` cell uses is for the notebook's own looks, and is no flag. What would not work the same in a
script stops the export; nothing else is dropped.
"""

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

import nbformat
from nbconvert.preprocessors import Preprocessor
from papermill.translators import PythonTranslator

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE_IMPORTS = ("import argparse", "import sys", "from pathlib import Path")


def cell_error(node, reason):
    """Return the error for a statement that cannot be exported; its `lineno` is the line in the cell."""
    return SyntaxError(reason, ("cell", node.lineno, None, None))


def parse_cell(source):
    """Parse a cell as plain Python, because a script has neither magics nor `get_ipython`."""
    try:
        tree = ast.parse(source)
        compile(tree, "cell", "exec")  # also refuses what the grammar accepts, such as `return` outside a function
    except SyntaxError as error:
        error.msg += "; an exported cell is plain Python, so keep magics (%, !) in an untagged cell"
        raise
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "get_ipython":
            raise cell_error(node, "a script has no get_ipython(); keep it in an untagged cell")
    return tree


def read_parameters(source):
    """Read the parameters cell as papermill does, but refuse every line that papermill would skip or misread.

    Args:
        source: code of the cell, lines of `name: type = literal  # help`.

    Returns:
        list of `papermill.models.Parameter`, one for each line.

    Raises:
        SyntaxError: if a line would not become a complete flag.
    """
    parameters = []
    for node in parse_cell(source).body:
        line = source.split("\n")[node.lineno - 1]
        try:
            kind, default = node.annotation.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            kind = default = None
        is_literal = kind in ("bool", "int", "float", "str") and kind == type(default).__name__
        if not is_literal and (kind, default) != ("list", []):
            form = "`name: type = literal  # help`, a bool, int, float or str with a literal of that type, or list = []"
            raise cell_error(node, f"expected {form}; derive values in a `main` cell")
        if line.count("=") > 1:
            raise cell_error(node, "papermill skips a line with a second `=`; reword the help, or write two lines")
        inspected = PythonTranslator.inspect({"source": line})
        if [parameter.default for parameter in inspected] != [ast.get_source_segment(source, node.value)]:
            raise cell_error(node, "papermill misreads the default; write it on one line and without a `#`")
        if not inspected[0].help:
            raise cell_error(node, "expected a comment after the default; --help shows it")
        parameters += inspected
    return parameters


def read_export(source):
    """Return an `export` cell without the imports that the template holds for every script."""
    repeated = {node.lineno for node in parse_cell(source).body if ast.unparse(node) in TEMPLATE_IMPORTS}
    return "\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in repeated)


def read_main(source):
    """Return a `main` cell indented by four spaces, except inside multi-line strings, whose content must not change."""
    parse_cell(source)
    inside_string = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        inside_string.update(range(token.start[0] + 1, token.end[0] + 1))
    lines = enumerate(source.split("\n"), 1)
    return "\n".join(line if number in inside_string else "    " + line for number, line in lines)


def read_docstring(nb):
    """Return the paragraph after the notebook's `# Title`, ready to stand between triple quotes."""
    markdown = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    paragraph = re.match(r"\s*# .*\n\s*([^#\s].*(?:\n.*\S.*)*)", markdown)
    if not paragraph:
        raise ValueError("expected markdown that starts with a `# Title` and a paragraph for the script's docstring")
    text = textwrap.fill(paragraph[1], 116, break_long_words=False, break_on_hyphens=False)
    return text.replace("\\", r"\\").replace('"""', r"\"\"\"")


def read_script(nb):
    """Return the parts of a script by name; raise ValueError if the notebook cannot be exported."""
    read = {"parameters": read_parameters, "export": read_export, "main": read_main}
    parts = {tag: [] for tag in read}
    for cell in nb.cells:
        for tag in parts.keys() & cell.metadata.get("tags", []):
            try:
                parts[tag].append(read[tag](cell.source))
            except SyntaxError as error:
                line = cell.source.split("\n")[error.lineno - 1].strip()
                raise ValueError(f"`{tag}` cell, line {error.lineno}, `{line}`: {error.msg}") from None
    if not nb.metadata.get("export", "").endswith(".py"):
        raise ValueError('expected the script\'s name in the notebook\'s metadata, such as `"export": "train.py"`')
    if len(parts["parameters"]) > 1:
        raise ValueError("expected one `parameters` cell, because papermill reads only the first; merge them")
    if not parts["main"]:
        raise ValueError("expected a `main` cell; tag the cells that the script runs")
    if "import utils" not in "\n".join(parts["export"]).split("\n"):
        raise ValueError("expected `import utils` in an `export` cell; the script starts with utils.run_script")
    main = ast.walk(ast.parse("def main():\n" + "\n".join(parts["main"])))
    used = {node.id for node in main if isinstance(node, ast.Name)}
    parameters = [parameter for parameter in sum(parts["parameters"], []) if parameter.name in used]
    return parts | {"parameters": parameters, "docstring": read_docstring(nb)}


class ScriptPreprocessor(Preprocessor):
    """Gives the template the parts of the script, and nbconvert its name."""

    def preprocess(self, nb, resources):
        notebook = f"notebooks/{resources['metadata']['name']}.ipynb"
        try:
            resources["script"] = read_script(nb) | {"notebook": notebook}
        except ValueError as error:
            sys.exit(f"{notebook}: {error}")  # one line; any other exception would print nbconvert's traceback
        resources["unique_key"] = nb.metadata.export.removesuffix(".py")
        return nb, resources


def format_code(source):
    """Format a script with ruff and the settings in pyproject.toml."""
    command = [sys.executable, "-m", "ruff", "format", "-"]
    return subprocess.run(command, cwd=ROOT, input=source, stdout=subprocess.PIPE, text=True, check=True).stdout


notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
c = get_config()  # noqa: F821 (nbconvert defines it)
c.NbConvertApp.export_format = "python"
c.NbConvertApp.notebooks = [str(path) for path in notebooks if "export" in nbformat.read(path, as_version=4).metadata]
c.FilesWriter.build_directory = str(ROOT / "scripts")
c.PythonExporter.template_file = str(ROOT / "tools" / "script.py.j2")
c.PythonExporter.preprocessors = [ScriptPreprocessor]
c.PythonExporter.filters = {"format_code": format_code}
