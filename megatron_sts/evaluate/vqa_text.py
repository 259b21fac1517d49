"""VQA v2's text normalisation (GT-Vision-Lab/VQA, ``vqaEval.py``): answers that differ in it alone are the same answer."""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The official script hands a flag of that value to ``re.sub`` as its count."""

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""The official table's right-hand sides, but for those with capitals: it looks up lower-case words."""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official table, too


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, number words as digits, contractions with their apostrophes."""
    original = text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = _COMMA_IN_NUMBER.search(original) is not None
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if is_loose or has_thousands else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
