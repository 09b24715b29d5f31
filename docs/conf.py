"""The documentation as pages: `make docs`."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

project = "fedmed_flower"
author = "The fedmed_flower authors"
version = release = version_of("fedmed-flower")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated_pages",
    "public_references",
]
exclude_patterns = ["extensions", "generated", "_static"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

# A name in single backticks is a link if it is a public name, else code.
default_role = "py:obj"
nitpicky = True
# Names of other packages, and words such as "optional" that stand for a type in a docstring, are
# text: no list of another project's names is fetched while the pages are built. What begins with
# fedmed_flower must be there.
nitpick_ignore_regex = [(r"py:.*", r"(?!fedmed_flower\b).*")]

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
# Else each class would repeat what Flower says of its own methods.
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Hooks", "params_style")]
maximum_signature_line_length = 140
add_module_names = False
toc_object_entries_show_parents = "hide"

copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "fedmed_flower"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
