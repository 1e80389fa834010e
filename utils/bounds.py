"""What a value of config.yaml may be, as the beginning of its comment says. The notation: utils/config.py."""

import operator
import re

_NUMBER = r"-?\d+(?:\.\d+)?(?:e\d+)?"
_LIMIT = rf"(?:>=|<=|>|<){_NUMBER}"
_NUMBERS = rf"any|{_NUMBER}\.\.{_NUMBER}|{_LIMIT}(?: {_LIMIT})*"
_CHOICE = rf'(?:{_NUMBERS}|""|[\w-]+)'
_BOUND = re.compile(rf"({_NUMBERS}|{_CHOICE}(?:\|{_CHOICE})+|\[{_CHOICE}(?:\|{_CHOICE})*\]): ")
_SIGNS = {">=": (operator.ge, "of at least"), ">": (operator.gt, "above"),
          "<=": (operator.le, "of at most"), "<": (operator.lt, "below")}


class Bound:
    """One bound: `>=1`, `0.0..1.0`, `vp|subvp|ve`, `[>=1]`. `.real`: its numbers need not be whole."""

    def __init__(self, text):
        self.is_list, choices = text.startswith("["), text.strip("[]").split("|")
        self.numbers = [choice for choice in choices if re.fullmatch(_NUMBERS, choice)]
        self.words = [choice.strip('"') for choice in choices if choice not in self.numbers]
        self.real = any("." in choice.replace("..", "") or choice == "any" for choice in self.numbers)

    def holds(self, value):
        """Whether a value is within the bound; of a list: every item."""
        if self.is_list:
            return isinstance(value, list) and all(map(self._holds, value))
        return self._holds(value)

    def _holds(self, value):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return (str(value).lower() if isinstance(value, bool) else value) in self.words
        return (self.real or isinstance(value, int)) and any(
            all(_SIGNS[sign][0](value, float(limit)) for sign, limit in _limits(choice)) for choice in self.numbers)

    def __str__(self):
        """The bound in words, as in "must be ..."."""
        kind = "number" if self.real else "whole number"
        kind = f"{kind}s" if self.is_list else f"a {kind}"
        texts = [word or '""' for word in self.words]
        for choice in self.numbers:
            limits = " and ".join(f"{_SIGNS[sign][1]} {limit}" for sign, limit in _limits(choice))
            limits = "from " + choice.replace("..", " to ") if ".." in choice else limits
            texts.append(f"{kind} {limits}".strip())
        text = " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
        return f"a list of {text}" if self.is_list else text


def split(comment):
    """(the Bound that a comment begins with, or None; the rest of the comment)."""
    match = _BOUND.match(comment)
    return (Bound(match[1]), comment[match.end():]) if match else (None, comment)


def _limits(choice):
    """`0..1` and `>=0 <=1` as [(">=", "0"), ("<=", "1")]; `any` as []."""
    if ".." in choice:
        return list(zip((">=", "<="), choice.split("..")))
    return [re.fullmatch(r"([<>]=?)(.*)", limit).groups() for limit in choice.split()] if choice != "any" else []
