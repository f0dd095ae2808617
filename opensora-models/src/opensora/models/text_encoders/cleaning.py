"""Cleaning of captions, as for the training data of DeepFloyd IF, PixArt and Open-Sora.

Models that were trained on cleaned captions expect cleaned prompts: addresses, file names, markup, codes and decoration are
removed, the rest is lower case with single spaces. The result is exactly that of the published models, oddities included.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterable
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

__all__ = ["clean_caption", "prepare_prompt"]

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_EXTENSION = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)

Rule = tuple[re.Pattern[str], str]


def _rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_BEFORE_MARKUP = _rules(
    (r"<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # names of accounts
    (r"[\u31c0-\u31ef]+", ""),  # strokes, phonetics, enclosed and square letters, ideographs
    (r"[\u31f0-\u31ff]+", ""),
    (r"[\u3200-\u32ff]+", ""),
    (r"[\u3300-\u33ff]+", ""),
    (r"[\u3400-\u4dbf]+", ""),
    (r"[\u4dc0-\u4dff]+", ""),
    (r"[\u4e00-\u9fff]+", ""),
    (rf"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # a time at the end
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_EXTENSION}", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile(r"[-_]")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # codes such as jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_EXTENSION}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes such as 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def prepare_prompt(text: str, *, clean: bool = True) -> str:
    """A prompt as a text encoder is given it.

    Args:
        clean: Clean it, twice, since the first pass can leave something for a second. Otherwise lower case only.
    """
    return clean_caption(clean_caption(text)) if clean else text.lower().strip()


def clean_caption(text: str) -> str:
    """One pass of cleaning."""
    text = _apply(_BEFORE_MARKUP, unquote_plus(text).strip().lower())
    text = _apply(_CHARACTERS, _without_markup(text))
    if len(_JOINTS.findall(text)) > 3:  # words-joined-like-this-one
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_ENDS, _apply(_WORDS, text)).strip()


def _apply(rules: Iterable[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a prompt may look like a path
        return BeautifulSoup(text, features="html.parser").text
