"""Sphinx: ``sphinx-build -W -b html docs docs/_build`` after ``pip install -e ".[docs]"``; it needs no network."""

from fedleak import __version__

project = "fedleak"
author = "the fedleak authors"
copyright = author
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"fedleak {version}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/docs run the notebooks; the site shows what they gave

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and units stand in the text
napoleon_use_ivar = True
