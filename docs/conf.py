"""The site: `sphinx-build -W --keep-going docs build/docs`. Settings of Sphinx and two hooks."""

import re

project = "demetar"
author = "The demetar developers"
copyright = "The demetar developers, Apache License 2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns: list[str] = []
templates_path: list[str] = []

# Markdown
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings: Google style, plain text, `x` is code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

highlight_language = "text"

# Looks
html_theme = "sphinx_book_theme"
html_title = "demetar"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field stands in the sidebar
    "use_download_button": False,
}
html_copy_source = False
html_show_sourcelink = False

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")


def plain_text(app, what, name, obj, options, lines) -> None:
    """Docstrings are written to be read in the code: an indented block is shown as it stands.

    Before the first section (Args, Attributes, ...) such a block becomes a literal one; and `|` and
    `*`, which mean something in reStructuredText, mean nothing here.
    """
    del app, what, name, obj, options
    shown, literal, described = [], False, False
    for line in lines:
        described |= bool(_SECTION.match(line))
        indented = line.startswith("  ") and not described
        if indented and not literal and (not shown or not shown[-1]):
            shown += ["::", ""]
            literal = True
        elif literal and line and not indented:
            literal = False
            if shown[-1]:
                shown.append("")
        shown.append(line if literal else _escape(line))
    lines[:] = shown


def _escape(line: str) -> str:
    """`x` as code, also in `x`s; `|` and `*` escaped elsewhere, but for a bullet."""
    bullet = re.match(r"\s*(\* )?", line)[0]
    parts = re.split(r"`+([^`]+)`+(?=(\w?))", line[len(bullet) :])
    texts, codes, next_letters = parts[::3], parts[1::3], parts[2::3]
    shown = re.sub(r"([|*])", r"\\\1", texts[0])
    for code, letter, text in zip(codes, next_letters, texts[1:], strict=True):
        shown += f"``{code}``" + ("\\ " if letter else "") + re.sub(r"([|*])", r"\\\1", text)
    return bullet + shown


def fields_of_flax(app, what, name, obj, options, signature, returns):
    """The options of a model, without the two fields that flax adds to every module."""
    del app, what, name, obj, options
    return re.sub(r",? parent: .*\)$", ")", signature or "") or None, returns


def setup(app) -> None:
    app.connect("autodoc-process-signature", fields_of_flax)
    # Before napoleon, which has Sphinx's usual priority of 500.
    app.connect("autodoc-process-docstring", plain_text, priority=400)
