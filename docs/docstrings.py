"""A griffe extension for the API page: "Example:" in a docstring is the section that griffe calls "Examples:"."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before a docstring is parsed. Otherwise its doctest would be read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
