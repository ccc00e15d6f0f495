"""The site: Sphinx with MyST. Notebooks are copied in and executed at every build; nothing is fetched, then or by a reader."""

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import imagesize
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.images import get_image_size

import riskcal
from riskcal.cli.demo import write_report

here = Path(__file__).parent
shutil.rmtree(here / "notebooks", ignore_errors=True)
shutil.copytree(here.parent / "notebooks", here / "notebooks", ignore=shutil.ignore_patterns(".*"))

(here / "generated").mkdir(exist_ok=True)
demo_report = here / "generated" / "demo-report.html"  # as `riskcal demo` leaves it
write_report(demo_report, riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1))

project = "riskcal"
copyright = "2026, The riskcal authors"
version = release = metadata.version("riskcal-ltt")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute"]  # what a build leaves behind
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
os.environ["PYTHONWARNINGS"] = (
    "ignore:IProgress not found"  # tqdm misses ipywidgets; there is no bar in a page
)
nb_merge_streams = True  # what a command prints in several goes is one output
nb_execution_timeout = 900  # a busy machine is slow, not wrong

autodoc_typehints = "none"
numpydoc_show_class_members = False

html_theme = "pydata_sphinx_theme"
html_title = f"riskcal {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["riskcal.css"]
html_js_files = ["print.js"]
html_math_renderer = "mathml"
html_extra_path = ["policy.schema.json", "generated/demo-report.html"]
html_theme_options = {
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {
    "default_mode": "auto"
}  # without it, the theme complains on the console of each page
html_sidebars = {"index": []}


def described(app, doctree, page):
    """A picture without a description is a warning: of a cell's, it is ``mystnb: image: alt`` in the cell's metadata.

    What a phone has no room for is told here, since a style cannot see it: wide pictures, of many dots to the inch or of few,
    cells of tables that hold sentences, and printed sentences, which may be wrapped where columns would fall apart.
    """
    for image in doctree.findall(nodes.image):
        if not image.get("alt"):
            logging.getLogger(__name__).warning("a picture without a description", location=image)
        path = Path(app.srcdir, image["uri"])
        width, _ = get_image_size(path) or (0, 0)
        if width > 560:
            dense = path.suffix == ".png" and imagesize.getDPI(path)[0] > 130
            image["classes"] += ["wide", *(["dense"] if dense else [])]
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) > 30:
            cell["classes"].append("sentence")
    for block in doctree.findall(nodes.literal_block):
        columns = re.search(r"\S {2,}\S|[│┃|]|^ +\S", block.astext(), re.MULTILINE)
        if "output" in block["classes"] + block.parent["classes"] and not columns:
            block["classes"].append("sentence")


def link_pictures(app, page, template, context, doctree):
    """Each picture leads to itself alone, where a phone can make it larger; so keys reach what is moved sideways, too."""
    picture = r'(<a [^>]*>)?<img (?=[^>]*src="([^"]*_images/[^"]*)")[^>]*>'

    def linked(found):
        if found[1]:  # Sphinx links what has a width of its own
            return found[0].replace('class="', 'class="picture ', 1)
        return f'<a class="picture" href="{found[2]}">{found[0]}</a>'

    context["body"] = re.sub(picture, linked, context.get("body", ""))


def name_toggles(app, page, template, context, doctree):
    """Say of each toggle in the sidebar what it unfolds: the theme draws an arrow, of which a screen reader says nothing."""
    tree = context["generate_toctree_html"]

    toggle = r"<a [^>]*>((?:(?!</a>).)*)</a>\s*<details[^>]*>\s*<summary(?=>)"

    def name(found):
        return f'{found[0]} aria-label="Below {re.sub("<[^>]*>", "", found[1]).strip()}"'

    def named(kind, *given, **options):
        drawn = tree(kind, *given, **options)
        return drawn if kind == "raw" else re.sub(toggle, name, str(drawn))

    context["generate_toctree_html"] = named


def setup(app):
    """Render formulas as MathML, which browsers show without a script; see to what the theme leaves unnamed."""
    app.connect("doctree-resolved", described)
    app.connect("html-page-context", link_pictures)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme's own

    def inline(translator, node):
        translator.body.append(tex2mathml(node.astext(), as_block=False))
        raise nodes.SkipNode

    def block(translator, node):
        # the theme lets keys reach what bears this class, where it is moved sideways
        scrolls = 'class="pst-scrollable-table-container"'
        translator.body.append(f"<p {scrolls}>{tex2mathml(node.astext(), as_block=True)}</p>")
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
