"""The grammar of an answer whose form the client prescribes, as llguidance takes it.

What is asked for, JSON that fits a schema, a regular expression, a grammar, one of several texts or calls of
functions, is a `Body`; around it a model that thinks may think first. Every part is checked on its own, so
that an error names the field it came from.

Source: https://github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, grammar_from, regex_to_lark

from services.router.answer.families import CallStyle
from services.router.answer.hermes import BEGIN as HERMES
from services.router.answer.hermes import END as HERMES_END
from services.router.answer.mistral import BEGIN as MISTRAL
from services.router.answer.parser import BEGIN_THOUGHT, END_THOUGHT, Thinking

#: Of a whole grammar: what workers and this process keep of those asked for lately stays within 50 MB.
MAX_CHARS = 256 * 1024

#: Between the parts of a JSON document: nothing, a space, or a line break and an indentation. Small models
#: that may write any white space at times write nothing else until their tokens are used up.
_WHITE_SPACE = r"( |\r?\n[ \t]{0,40})"

#: Calls that an answer may have where it must have some: else a small model may never stop calling.
_MOST_CALLS = 16

#: Special tokens among the marks, and their ids. They are no text to a grammar.
Special = Mapping[str, int]


class FormError(ValueError):
    """The form cannot be followed; the message says why."""


@dataclass(frozen=True)
class Body:
    """What an answer has to be: a JSON schema, or a grammar in Lark's language where there is one."""

    json_schema: Any = None
    lark: str = ""

    def part(self, name: str) -> dict[str, Any]:
        """As an entry of llguidance's list of grammars."""
        written = {"lark_grammar": self.lark} if self.lark else {"json_schema": self.json_schema}
        return {"name": name, **written}


@dataclass(frozen=True)
class Function:
    """One that may be called: its name and the schema of its arguments (see `json_body`)."""

    name: str
    arguments: Body


# ---- bodies


def json_body(schema: Mapping[str, Any], *, strict: bool) -> Body:
    """JSON that fits `schema`. Raises FormError where it is no schema, or, if `strict`, has a keyword that
    cannot be enforced; else those are ignored."""
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": not strict}
    return _checked(Body(json_schema={**schema, "x-guidance": options}))


def regex_body(pattern: str) -> Body:
    """A text that the whole regular expression (of Rust's regex crate) matches. Raises FormError."""
    return _checked(Body(lark=f"start: /{regex_to_lark(pattern)}/"))


def choice_body(choices: Sequence[str]) -> Body:
    """One of these texts. Raises FormError."""
    return _checked(Body(lark="start: " + " | ".join(map(_quoted, choices))))


def grammar_body(grammar: str) -> Body:
    """A text that follows a grammar in Lark's or llama.cpp's (GBNF) language. Raises FormError."""
    try:
        lark = grammar_from("grammar", grammar)
    except ValueError as error:
        raise FormError(str(error)) from None
    return _checked(Body(lark=lark))


def calls_body(functions: Sequence[Function], style: CallStyle, special: Special, *, several: bool) -> Body:
    """A call of one of the functions, or several calls, written as a family of models does."""
    calls, rules = _calls(functions, style, special, several)
    begin = f"{_mark(MISTRAL, special)} " if style == "mistral" else ""
    return Body(lark="\n".join([f"start: {begin}{calls}", *rules]))


def free_calls_body(functions: Sequence[Function], style: CallStyle, special: Special) -> Body:
    """Any text, in which each call is one of a function with arguments that fit."""
    calls, rules = _calls(functions, style, special, True)
    match style:
        case "hermes":
            rules += _leading(HERMES, special)
            start = "(lead call_rest)* text"
        case "mistral":
            rules += _leading(MISTRAL, special)
            start = f"(lead {calls})* text"
        case "llama":  # nothing but a call begins with a brace
            rules.append(r"text: /\s*([^{\s](.|\n)*)?/")
            start = f"{calls} | text"
    return Body(lark="\n".join([f"start: {start}", *rules]))


def _calls(
    functions: Sequence[Function], style: CallStyle, special: Special, several: bool
) -> tuple[str, list[str]]:
    """(calls, but for Mistral's mark before them; the rules of that)."""
    key = "parameters" if style == "llama" else "arguments"
    rules = ["object: " + " | ".join(f"object_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = _quoted(f'{{"name": {json.dumps(function.name)}, "{key}": ')
        rules.append(f'object_{i}: {head} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(function.arguments.json_schema)}")
    if style == "hermes":
        rules.append(f"call: {_mark(HERMES, special)} call_rest")
        rules.append(rf'call_rest: "\n" object "\n" {_mark(HERMES_END, special)}')
    else:
        rules.append("call: object")
    between = {"hermes": r"\n", "llama": "; ", "mistral": ", "}[style]
    calls = f'call ("{between}" call){{0,{_MOST_CALLS - 1}}}' if several else "call"
    return (f'"[" {calls} "]"' if style == "mistral" else calls), rules


def _leading(mark: str, special: Special) -> list[str]:
    """Rules of any text, and of a text up to a mark."""
    text = r"text: /(.|\n)*/"
    if mark in special:
        return [text, f"lead: text {_mark(mark, special)}"]
    return [text, rf"lead[lazy]: /(.|\n)*{_escaped(mark)}/"]


# ---- the whole answer


def answer_grammar(bodies: Sequence[Body], thinking: Thinking, special: Special) -> str:
    """An answer that is one of the bodies, after thoughts where there may be some. Raises FormError."""
    if len(bodies) == 1 and thinking == "none":
        return _validated([bodies[0].part("answer")])
    names = [f"body_{i}" for i in range(len(bodies))]
    rules = ["body: " + " | ".join("@" + name for name in names)]
    if thinking == "none":
        start = "body"
    else:
        rules += [*_leading(END_THOUGHT, special), r"space: /\s{0,4}/"]
        start = "lead space body"
    if thinking == "possible":
        start = f"({_mark(BEGIN_THOUGHT, special)} lead space)? body"
    parts: list[dict[str, Any]] = [{"name": "answer", "lark_grammar": "\n".join([f"start: {start}", *rules])}]
    return _validated(parts + [body.part(name) for body, name in zip(bodies, names, strict=True)])


def _mark(mark: str, special: Special) -> str:
    """A mark in Lark's language, by its id where it is a special token."""
    return f"<[{special[mark]}]>" if mark in special else _quoted(mark)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(mark: str) -> str:
    """For a regular expression in Lark's language."""
    return re.escape(mark).replace("/", r"\/")


def _checked(body: Body) -> Body:
    _validated([body.part("answer")])
    return body


def _validated(parts: Sequence[dict[str, Any]]) -> str:
    grammar = json.dumps({"grammars": parts})
    if len(grammar) > MAX_CHARS:
        raise FormError(f"it has {len(grammar)} characters, the limit is {MAX_CHARS}")
    if error := _error_of(grammar):
        raise FormError(error)
    return grammar


@lru_cache(maxsize=128)  # a client asks for the same form over and over
def _error_of(grammar: str) -> str:
    error: str = LLMatcher.validate_grammar(grammar)
    return error.strip().partition("\n")[0][:300]
