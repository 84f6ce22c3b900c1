"""What an answer consists of: thoughts, content, and calls of tools.

A model writes all three as one text, each family in its own way (`families`). `AnswerParser` takes the text
as it comes and hands out its pieces; `form` makes the grammar of an answer whose form the client prescribes.
Pure: text in, pieces or a grammar out.
"""

from services.router.answer.families import Family, family_of
from services.router.answer.parser import AnswerParser

__all__ = ["AnswerParser", "Family", "family_of"]
