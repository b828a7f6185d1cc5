"""The site: `python -m sphinx --fail-on-warning --keep-going notebooks notebooks/_build/html`.

Every page with code cells is run while it is built, against the working tree that this file lies in.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from jupyter_cache import get_cache
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "experiments")]
sys.path[:0] = SOURCES

from state import state_of  # noqa: E402

# What the kernels of the pages inherit: this tree whatever else is installed, and the same device everywhere.
os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

EXECUTED = ROOT / ".docs_cache"
"""Pages that were run before and whose code did not change are not run again, while nothing else did."""
STATE = state_of(Path(__file__))


def open_cache_of_this_state() -> None:
    """Remove what was run with other sources or versions, and make room for what is run now."""
    for folder in EXECUTED.glob("*"):
        if folder.name != STATE:
            shutil.rmtree(folder, ignore_errors=True)
    get_cache(nb_execution_cache_path).list_cache_records()  # two processes cannot make it at once


project = "jaxattn"
author = "The jaxattn authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
default_role = "py:obj"  # single backticks, as in Markdown; a link where the name is documented
smartquotes_action = "D"  # dashes alone: much of what is quoted is code

html_theme = "sphinx_book_theme"
html_title = "jaxattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "use_download_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search stands in the sidebar
}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(EXECUTED / STATE)
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables

autodoc_member_order = "bysource"
autodoc_default_options = {"no-value": True}
autodoc_preserve_defaults = True
autodoc_type_aliases = {f"jax.typing.{name}": name for name in ("ArrayLike", "DTypeLike")}
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"

OVERLOADED = {
    "jaxattn.attention.api": ["attention"],
    "jaxattn.models.decoder": ["forward"],
    "jaxattn.nn.linen": ["Attention.__call__"],
    "jaxattn.nn.nnx": ["Attention.__call__"],
}
"""What is shown with the one signature of its implementation, by module."""

QUICKLY_COMPILED = ("how_to/", "01_", "02_", "03_", "05_")
"""Pages whose code is small and timed by nobody: compiling it is most of what building them takes."""


def show_one_signature(app: Sphinx) -> None:
    """Forget the overloads, which repeat a long signature to say that one argument decides the result."""
    for module, names in OVERLOADED.items():
        analyzer = ModuleAnalyzer.for_module(module)
        analyzer.analyze()
        for name in names:
            analyzer.overloads.pop(name, None)


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what stands elsewhere: fields of metadata in their table, those of tuples in the class."""
    from jaxattn.metadata.fields import MetadataField

    is_tuple_field = "Alias for field number" in (getattr(obj, "__doc__", None) or "")
    return True if is_tuple_field or isinstance(obj, MetadataField) else None


def readable_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave aliases of types as they are written; of Flax modules show what their users give."""
    if what == "class" and name.startswith("jaxattn.nn."):
        signature = _module_signature(obj)
    if getattr(obj, "_is_protocol", False):
        signature = ""  # nobody makes one
    return _as_written(signature), _as_written(returns)


def _as_written(text: str | None) -> str | None:
    """Aliases by their names, and no defaults that are not Python."""
    if text is None:
        return None
    return re.sub(r"<[^<>]*>", "...", re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text))


def _module_signature(module: type) -> str:
    """The arguments of a Flax module's `__init__`, without what Flax adds, and with types as written."""
    shown = []
    for parameter in list(inspect.signature(module.__init__).parameters.values())[1:]:
        if not isinstance(parameter.annotation, str):
            continue
        default = parameter.default
        is_plain = isinstance(default, bool | str | None)
        value = "" if default is parameter.empty else f" = {default!r}" if is_plain else " = ..."
        shown.append(f"{parameter.name}: {parameter.annotation}{value}")
    return f"({', '.join(shown)})"


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Say to napoleon what it could not know."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"  # or it takes what stands before a colon for a type
    if dataclasses.is_dataclass(obj):
        meanings = {f.name: f.metadata["meaning"] for f in dataclasses.fields(obj) if "meaning" in f.metadata}
        if meanings:
            lines += ["Attributes:", *(f"    {field}: {meaning}." for field, meaning in meanings.items()), ""]


def readable_axes(app: Sphinx, doctree: nodes.document) -> None:
    """Write axes of arrays as the glossary does: `"R+1"`, not `" R_plus_1"`."""
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            new = text.replace("_plus_", "+").replace("_times_", "×")
            new = re.sub(r"^' ", "'", new)
            if new != text:
                text.parent.replace(text, nodes.Text(new))


def compile_quickly(app: Sphinx, docname: str, content: list[str]) -> None:
    """Let XLA skip its optimisations, and JAX keep the programs for the next time, where only results matter.

    A page's kernel inherits the environment.
    """
    quickly = str(int(docname.startswith(QUICKLY_COMPILED)))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = os.environ["JAX_ENABLE_COMPILATION_CACHE"] = quickly


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above."""
    open_cache_of_this_state()
    app.connect("builder-inited", show_one_signature)
    app.connect("autodoc-process-signature", readable_types)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon
    app.connect("doctree-read", readable_axes)
    app.connect("source-read", compile_quickly)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
