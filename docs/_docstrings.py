"""Turns the reStructuredText of the package's docstrings into Markdown for the site: roles, links, literals, math."""

import re

import griffe
from latex2mathml.converter import convert as mathml

_RULES = [
    (re.compile(r":math:`([^`]+)`", re.DOTALL), lambda match: mathml(" ".join(match[1].split()))),
    (re.compile(r":(?:func|class|meth|obj):`~?\.?([\w.]+)`"), lambda match: _reference(match[1])),
    (re.compile(r"``(.+?)``", re.DOTALL), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_+", re.DOTALL), r"[\1](\2)"),
    (re.compile(r"^(\s*)(Cost|Differentiable|Accuracy|Limits): ", re.MULTILINE), r"\1**\2:** "),
]


class Markdown(griffe.Extension):
    """The griffe extension named in mkdocs.yml."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            for pattern, replacement in _RULES:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)


def _reference(name):
    return f"[`{name}`][opnorm_jax.{name.removeprefix('opnorm_jax.')}]"
