"""The documentation as a site, by Sphinx: ``make docs`` writes it to output/site.

Sphinx reads from the root of the repository, so that a page may link to a page or notebook outside
of docs/. Everything that a page needs is in the site itself: no fonts, scripts or styles of other
hosts (tests/docs holds it to that). docs/_extensions adds what Sphinx lacks.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_extensions"), str(ROOT / "projects")]

project = "StageInteractor for Detectron2"
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "notebooks/*.ipynb",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "checkpoints/README.md",
]
# Folders that are not worth walking through.
exclude_patterns = [".*", "build", "configs", "dist", "output", "projects", "shared", "tests"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "equations",
    "menu",
    "public_names",
    "sources",
]

# The menu: where a page belongs, and its name there if its title is too long. A page that is
# missing here fails the build.
menu = {
    "Start": [
        "/docs/getting_started",
        "Tutorial </notebooks/tutorial>",
        "Coming from another project </docs/coming_from>",
        "Questions and answers </docs/faq>",
    ],
    "Data": [
        "Your own data </docs/own_data>",
        "Train on COCO </docs/coco>",
    ],
    "Training": [
        "Configs </docs/configs>",
        "Training </docs/training>",
        "Extend it </docs/extending>",
        "When things go wrong </docs/robustness>",
        "Looking inside </docs/visualization>",
    ],
    "Deployment": [
        "Demo and predictor </docs/demo>",
        "A page in the browser </docs/web>",
        "Export </docs/export>",
        "Dependencies </docs/dependencies>",
    ],
    "Methods": [
        "StageInteractor </docs/method>",
        "Differences from the authors' code </docs/differences>",
        "SQR </docs/sqr>",
        "Deformable DETR </docs/deformable_detr>",
        "DINO and DN-Deformable-DETR </docs/dino>",
        "Align-DETR </docs/align_detr>",
        "DDQ </docs/ddq>",
        "HPR </docs/hpr>",
        "DFvT </docs/dfvt>",
    ],
    "Results": [
        "Models </docs/models>",
        "Ablation on small data </docs/results>",
        "Performance </docs/performance>",
        "Parity </docs/parity>",
    ],
    "Project": [
        "Architecture </docs/architecture>",
        "All tools </docs/tools>",
        "/docs/reference",
        "Contributing </CONTRIBUTING>",
        "Changelog </CHANGELOG>",
        "Security </SECURITY>",
        "The shipped checkpoint </checkpoints/README>",
    ],
}

# Markdown as GitHub reads it.
myst_enable_extensions = ["dollarmath", "strikethrough"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 6
nb_execution_mode = "off"  # tests/docs runs the notebook
nb_ipywidgets_js = {}  # would come from another host

html_math_renderer = "mathml"  # docs/_extensions/equations.py
nitpicky = True

napoleon_use_ivar = True
napoleon_use_rtype = False  # what precedes a colon is a shape as often as a type
add_module_names = False
autoclass_content = "both"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = project
html_extra_path = ["_root"]  # leads to the first page
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False
html_show_copyright = False
html_show_search_summary = False  # would read other pages, which files may not
html_use_index = False
copybutton_exclude = ".linenos, .gp, .go"
