"""Sphinx configuration; `make docs` builds the pages, with warnings as errors.

The source folder is the whole repository. The pages are the same Markdown files and notebooks that a code host shows,
so links between them are relative and work in both places.
"""

import dataclasses
from importlib import metadata

from jaxbn import linen

project, author = "jaxbn", "The jaxbn authors"
release = metadata.version(project)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "notebooks/*.ipynb", "experiments/README.md"]
exclude_patterns = ["docs/_build", ".*", "data", "**/__pycache__"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False

myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 4
nb_merge_streams = True
nb_execution_mode = "off"  # notebooks are committed with their outputs, and a test executes them

autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
default_role = "code"
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

# A link to an undocumented name is a warning, and so an error, unless the name belongs to another library.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|flax|numpy|collections|typing|optax)\..*"),
    ("py:.*", rf"{project}\.(\w+\.)*_.*"),  # private types of fields, and type variables
]


FIELDS = {field.name for layer in (linen.BatchNorm, linen.Affine) for field in dataclasses.fields(layer)}


def skip_fields(app, what, name, obj, skip, options) -> bool:
    """Skips attributes that are fields: the section "Attributes" of the class docstring documents them."""
    return skip or (what == "class" and (name in FIELDS or not callable(obj)) and not isinstance(obj, property))


def setup(app) -> None:
    """Connects `skip_fields`."""
    app.connect("autodoc-skip-member", skip_fields)
