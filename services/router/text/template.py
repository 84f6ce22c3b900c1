"""Chat templates: messages and tools to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from os.path import commonprefix
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateError(ValueError):
    """The template refused the messages, or failed on them; the text says why."""


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks assistant text for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012 (declared like this by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models have never seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class ChatTemplate:
    """One model's template, compiled once, in a sandbox, with what transformers offers to templates:
    `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, trimmed blocks."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises ValueError if `source` is not a Jinja template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template cannot be compiled: {error}") from error
        self.source = source
        self._special_tokens = special_tokens
        self.takes_tools = "tools" in source
        self.knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. `extra` are the client's own template variables. Raises TemplateError."""
        try:
            return self._template.render(
                {
                    **(extra or {}),
                    **self._special_tokens,
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # templates fail on odd messages in every way that Python can
            raise TemplateError(str(error) or type(error).__name__) from error

    def message_starts(
        self,
        wanted: Sequence[int],
        whole: str,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        extra: dict[str, Any] | None,
    ) -> list[int]:
        """Where messages `wanted` (ascending indices, the number of messages meaning the end) begin in
        `whole`, the rendered prompt; in characters, never descending.

        Found by rendering the messages before each and comparing with `whole`, so a template that writes
        earlier messages differently once later ones follow only moves a boundary forward, and one that
        refuses a partial conversation leaves it at the boundary before.
        """
        starts = []
        known = 0
        for index in wanted:
            if index == len(messages):
                known = len(whole)
            elif index > 0:
                try:
                    before = self.render(messages[:index], tools, extra, add_generation_prompt=False)
                    known = max(known, len(commonprefix((before, whole))))  # noqa: RUF071 (texts)
                except TemplateError:
                    pass
            starts.append(known)
        return starts
