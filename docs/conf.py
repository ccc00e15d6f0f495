"""The site: Sphinx with MyST. Notebooks are copied in and executed at every build; nothing is fetched, then or by a reader."""

import os
import shutil
from importlib import metadata
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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
html_math_renderer = "mathml"
html_extra_path = ["policy.schema.json", "generated/demo-report.html"]
html_theme_options = {
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": []}


def setup(app):
    """Render formulas as MathML, which browsers show without a script."""

    def inline(translator, node):
        translator.body.append(tex2mathml(node.astext(), as_block=False))
        raise nodes.SkipNode

    def block(translator, node):
        translator.body.append(f"<p>{tex2mathml(node.astext(), as_block=True)}</p>")
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
