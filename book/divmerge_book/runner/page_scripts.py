"""A Sphinx extension of the book: its pages do not load what they do not use."""

from sphinx.application import Sphinx


def used_alone(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Leave out MathJax where there is no formula, and Thebe, which no button starts.

    Thebe's settings would stand twice on a page, which is an error.
    """
    unused = ["thebe"]
    if not app.env.get_domain("math").data["has_equations"].get(page):
        unused.append("mathjax")
    scripts = {f"{one.filename} {one.attributes}": one for one in context["script_files"]}
    kept = [one for text, one in scripts.items() if not any(name in text for name in unused)]
    context["script_files"] = kept


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", used_alone, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
