"""Text that looks like a command line, read strictly: words, quotes, pipes, and nothing else of a shell.

Owns: the reading of text into argv stages, and the sentence that says what to send instead of what a shell would do.
Deliberately does not know: programs, rules, files. It expands nothing.

Whatever this reader accepts, a POSIX shell reads the same way; whatever a shell would expand, redirect, chain or run in
the background is refused. ``2>&1`` and ``2>/dev/null`` are understood as where the runner puts standard error.
Source: POSIX.1-2017, Shell Command Language, sections 2.2 to 2.4.
"""

from __future__ import annotations

import dataclasses
import re
from typing import List, NoReturn, Tuple

from tools.kinds import Refusal


@dataclasses.dataclass(frozen=True)
class StageText:
    """The words of one process. ``globs``: positions of words with an unquoted glob character; ``stderr``: ``keep``,
    ``stdout`` or ``discard``."""

    words: Tuple[str, ...]
    globs: Tuple[int, ...] = ()
    stderr: str = "keep"


@dataclasses.dataclass(frozen=True)
class CommandText:
    """A pipeline as it was read."""

    stages: Tuple[StageText, ...]


_INSTEAD = {
    ";": ("';' would run a second command", "send each command as a call of its own"),
    "&": ("'&' would chain commands or leave one in the background", "send each command as a call of its own"),
    ">": ("'>' would write a file", "leave it out: output is kept anyway; 2>&1 and 2>/dev/null are understood"),
    "<": ("'<' would read a file into the command", "name the file as an argument"),
    "$": ("'$' would be expanded by a shell, and there is none", "send the value itself, or put it in single quotes"),
    "`": ("a backquote would run a command inside the command", "run that command first, in a call of its own"),
    "(": ("'(' would start a subshell", "send each command as a call of its own; quote it if it is meant literally"),
    ")": ("')' belongs to a subshell", "send each command as a call of its own; quote it if it is meant literally"),
    "{": ("'{' would be expanded or group commands", "write out each word; quote it if it is meant literally"),
    "}": ("'}' would be expanded or group commands", "write out each word; quote it if it is meant literally"),
    "~": ("'~' would be expanded to a home directory", "send the absolute path"),
    "#": ("'#' would begin a comment", "leave the comment out; quote it if it is meant literally"),
    "\n": ("a newline would begin a second command", "send each command as a call of its own"),
    "\r": ("a carriage return is no blank", "send one line"),
}
_GLOB = frozenset("*?[")
_BLANK = " \t"
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=")
_RESERVED = frozenset(
    ("!", "if", "then", "else", "elif", "fi", "do", "done", "case", "esac", "while", "until", "for", "in", "time", "function",
     "select", "coproc", "[[", "{", "}")
)  # fmt: skip
_STDERR = (("2>&1", "stdout"), ("2>/dev/null", "discard"), ("2> /dev/null", "discard"))


def parse(text: str) -> CommandText:
    """The pipeline that ``text`` is. Raises ``Refusal`` with what to send instead for all that is not words, quotes, pipes."""
    reader = _Reader(text)
    stages = [reader.stage()]
    while reader.more():
        stages.append(reader.stage())
    return CommandText(tuple(stages))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def more(self) -> bool:
        """Whether a pipe was consumed and another stage must follow."""
        if self.at < len(self.text) and self.text[self.at] == "|":
            following = self.text[self.at + 1 : self.at + 2]
            if following == "|":
                raise Refusal("'||' would run a second command", "send each command as a call of its own")
            if following == "&":
                raise Refusal("'|&' is not understood", "write 2>&1 | instead")
            self.at += 1
            return True
        return False

    def stage(self) -> StageText:
        words: List[str] = []
        globs: List[int] = []
        stderr = "keep"
        while True:
            self._blanks()
            if self.at >= len(self.text) or self.text[self.at] == "|":
                break
            where = self._stderr()
            if where:
                if stderr != "keep":
                    raise Refusal("standard error is sent to two places", "write 2>&1 or 2>/dev/null once")
                stderr = where
                continue
            if stderr != "keep":
                raise Refusal("words follow 2>&1 or 2>/dev/null", "put it at the end of its stage")
            started_quoted = self.text[self.at] in "'\"\\"
            word, glob = self._word()
            if not words and not started_quoted:
                self._first(word)
            if glob:
                globs.append(len(words))
            words.append(word)
        if not words or not words[0]:
            raise Refusal("a command is missing in %.120r" % self.text, "send words, such as: df -h")
        if 0 in globs:
            raise Refusal("the program's name holds a glob: %.80r" % words[0], "write the name out")
        return StageText(tuple(words), tuple(globs), stderr)

    def _first(self, word: str) -> None:
        if _ASSIGNMENT.match(word):
            raise Refusal("%.80r would set a variable" % word, "leave it out: the environment is fixed by the policy")
        if word in _RESERVED:
            raise Refusal("%r is a word of the shell, and there is no shell" % word, "send plain commands, one a call")

    def _blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in _BLANK:
            self.at += 1

    def _stderr(self) -> str:
        for form, meaning in _STDERR:
            if self.text.startswith(form, self.at):
                after = self.text[self.at + len(form) : self.at + len(form) + 1]
                if after == "" or after in _BLANK + "|":
                    self.at += len(form)
                    return meaning
        return ""

    def _refuse(self, character: str) -> NoReturn:
        reason, hint = _INSTEAD[character]
        raise Refusal("%s (at character %d)" % (reason, self.at + 1), hint)

    def _word(self) -> Tuple[str, bool]:
        text, out, glob = self.text, [], False
        start = self.at
        quoted = False
        while self.at < len(text):
            character = text[self.at]
            if character in _BLANK or character == "|":
                break
            if character == "'":
                end = text.find("'", self.at + 1)
                if end < 0:
                    raise Refusal("a single quote is not closed (at character %d)" % (self.at + 1), "close it")
                out.append(text[self.at + 1 : end])
                quoted = quoted or not _GLOB.isdisjoint(out[-1])
                self.at = end + 1
            elif character == '"':
                out.append(self._double())
                quoted = quoted or not _GLOB.isdisjoint(out[-1])
            elif character == "\\":
                if self.at + 1 >= len(text) or text[self.at + 1] in "\n\r":
                    raise Refusal("a backslash stands before the end of a line", "send the command as one line")
                out.append(text[self.at + 1])
                quoted = quoted or out[-1] in _GLOB
                self.at += 2
            elif (character == "#" and self.at == start) or (
                character == "~" and (self.at == start or text[self.at - 1] in "=:")
            ):
                self._refuse(character)
            elif character in "#~":
                out.append(character)
                self.at += 1
            elif character in _INSTEAD:
                self._refuse(character)
            else:
                glob = glob or character in _GLOB
                out.append(character)
                self.at += 1
        word = "".join(out)
        if glob and quoted:
            # The reading is by word: which of its marks were quoted is not kept.
            raise Refusal("%.80r holds quoted and unquoted glob characters" % word, "quote all of it, or none")
        return word, glob

    def _double(self) -> str:
        text = self.text
        out: List[str] = []
        opened = self.at
        self.at += 1
        while self.at < len(text):
            character = text[self.at]
            if character == '"':
                self.at += 1
                return "".join(out)
            if character in "$`":
                self._refuse(character)
            if character == "\\" and self.at + 1 < len(text):
                following = text[self.at + 1]
                if following in "\n\r":
                    self._refuse(following)
                # Inside double quotes a backslash is itself unless one of these follows it.
                out.append(following if following in '$`"\\' else "\\" + following)
                self.at += 2
                continue
            if character in "\n\r":
                self._refuse(character)
            out.append(character)
            self.at += 1
        raise Refusal("a double quote is not closed (at character %d)" % (opened + 1), "close it")
