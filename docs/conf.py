"""The documentation site: `make docs` builds it from the pages in this folder, which are also read as they are on a forge."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # before an installed shardembed: pages tell of the code beside them

from shardembed import __version__  # noqa: E402

project = "shardembed"
author = "the shardembed authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docs.extension"]
source_suffix = {".md": "markdown", ".py": "markdown"}  # tutorials are Python files; docs.extension turns them into pages
exclude_patterns = ["_build", "conf.py", "extension", "pictures"]
root_doc = "index"
nitpicky = True  # so a name of ours that is gone is a warning, which make docs takes for an error
suppress_warnings = ["myst.header"]  # a page may begin a level below where its headings go on

myst_heading_anchors = 3
myst_links_external_new_tab = False
highlight_language = "text"  # of indented blocks; fenced ones name theirs
default_role = "literal"  # single backticks in docstrings

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_param = False  # arguments that are told of together stay together
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries = False

html_theme = "furo"
html_title = f"shardembed {__version__}"
html_static_path = ["extension/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
