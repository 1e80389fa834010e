"""What a value of config.yaml may be, as the beginning of its comment says. The notation: utils/config.py."""

import operator
import re

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_LIMIT = rf"(?:>=|<=|>|<){_NUMBER}"
_NUMBERS = rf"any|{_NUMBER}\.\.{_NUMBER}|{_LIMIT}(?: {_LIMIT})*"
_CHOICE = rf'(?:{_NUMBERS}|""|[\w-]+)'
_CONDITION = r"(?: (?:if|unless) [\w=|. -]+)?"
_BOUND = re.compile(
    rf"({_NUMBERS}|text|{_CHOICE}(?:\|{_CHOICE})+|\[{_CHOICE}(?:\|{_CHOICE})*\](?:\d+\+?)?)({_CONDITION}): ")
_SIGNS = {">=": (operator.ge, "of at least"), ">": (operator.gt, "above"),
          "<=": (operator.le, "of at most"), "<": (operator.lt, "below")}


class Bound:
    """One bound: `>=1`, `0.0..1.0`, `vp|subvp|ve`, `[>=1]2+`, `text`. `.real`: its numbers need not be whole.

    condition: ` if solver=dopri5` or ` unless labels=none`: when the value has an effect; see `idle`.
    """

    def __init__(self, text, condition=""):
        text, _, self.length = text.partition("]")     # of a list: "2", or "2+" for at least two
        self.is_list, choices, self.condition = text.startswith("["), text.strip("[").split("|"), condition.strip()
        self.is_text = choices == ["text"]
        self.numbers = [choice for choice in choices if re.fullmatch(_NUMBERS, choice)]
        self.words = [choice.strip('"') for choice in choices if choice not in self.numbers]
        self.real = any("." in choice.replace("..", "") or choice == "any" for choice in self.numbers)
        self.open = not any(sign.startswith("<") for choice in self.numbers for sign, _ in _limits(choice))

    def holds(self, value):
        """Whether a value is within the bound; of a list: every item."""
        if self.is_list:
            return isinstance(value, list) and self._fits(len(value)) and all(map(self._holds, value))
        return self._holds(value)

    def _fits(self, number):
        least = int(self.length.strip("+") or 0)
        return number >= least if not self.length or "+" in self.length else number == least

    def _holds(self, value):
        if self.is_text:
            return isinstance(value, str)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            quoted = value in ("true", "false")        # a text, whereas the words true and false are none
            return (str(value).lower() if isinstance(value, bool) else value) in self.words and not quoted
        return (self.real or isinstance(value, int)) and any(
            all(_SIGNS[sign][0](value, float(limit)) for sign, limit in _limits(choice)) for choice in self.numbers)

    def idle(self, key, values):
        """"" or why a key has no effect beside these values of its section, {key: value}, as its condition says."""
        word, _, text = self.condition.partition(" ")
        if not word or any(_met(one, values) for one in text.split(" or ")) == (word == "if"):
            return ""
        text = text.replace("|", " or ")
        return (f"{key} has an effect only with {text}: set that, or leave {key} out" if word == "if" else
                f"{key} has no effect with {text}: leave one of the two out")

    def __str__(self):
        """The bound in words, as in "must be ..."."""
        many = f"a list of {self.length.replace('+', ' or more')} ".replace("  ", " ")
        if self.is_text:
            return f"{many}texts" if self.is_list else "text"
        kind = "number" if self.real else "whole number"
        kind = f"{kind}s" if self.is_list else f"a {kind}"
        texts = [word or '""' for word in self.words]
        for choice in self.numbers:
            limits = " and ".join(f"{_SIGNS[sign][1]} {limit}" for sign, limit in _limits(choice))
            limits = "from " + choice.replace("..", " to ") if ".." in choice else limits
            texts.append(f"{kind} {limits}".strip())
        text = " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
        return many + text if self.is_list else text


def split(comment):
    """(the Bound that a comment begins with, or None; the rest of the comment)."""
    match = _BOUND.match(comment)
    return (Bound(match[1], match[2]), comment[match.end():]) if match else (None, comment)


def _met(one, values):
    """Whether `key` is anything but 0, "", false or none; whether `key=a|b` is one of these words or numbers."""
    key, equals, words = one.partition("=")
    value = values.get(key, "")
    text = f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    return text in words.split("|") if equals else text not in ("0", "", "false", "none")


def _limits(choice):
    """`0..1` and `>=0 <=1` as [(">=", "0"), ("<=", "1")]; `any` as []."""
    if ".." in choice:
        return list(zip((">=", "<="), choice.split("..")))
    return [re.fullmatch(r"([<>]=?)(.*)", limit).groups() for limit in choice.split()] if choice != "any" else []
