"""Captions as LlamaGen's text encoder was fed them: without links, markup, file names and what else pages leave."""

from __future__ import annotations

import html
import re
import urllib.parse
from html.entities import html5
from html.parser import HTMLParser
from typing import NamedTuple

from vapi_fast.runtime.errors import DataError
from vapi_fast.runtime.packages import require

PURPOSE = "encoding captions"
DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
# In the order of DeepFloyd's cleaning, which PixArt's and LlamaGen's are; each pattern with what takes its place.
LINKS = (
    (r"<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
)
MARKS = (
    (r"@\w+\b", ""),  # a nickname
    (r"[\u31c0-\u4dff\u4e00-\u9fff]+", ""),  # Chinese and Japanese signs
    (rf"[{DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # an address of a machine
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{SUFFIXES})", ""),
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
REST = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640, jc6640vc, 6640vc231
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{SUFFIXES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # the second is the Cyrillic letter
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
PLAIN = re.compile(r"(?<!\S)[A-Za-z]+(?!\S)")
TAKEN = {"worldwide", "free", "shipping", "download", "images", "page", *SUFFIXES.split("|")}  # words that a rule takes
HYPHENS = 3  # more of them stand for spaces: this-is-my-cute-cat


class Caption(NamedTuple):
    """An image's caption, and where its features lie in LlamaGen's layout: `<stem>/<line>.npy`."""

    text: str
    stem: str
    line: int


def clean_caption(caption: str) -> str:
    """A caption as LlamaGen's training had it: cleaned twice. Raises DataError where `ftfy` is not installed."""
    require(DataError, PURPOSE, "ftfy")
    return _clean(_clean(caption))


def has_words(caption: str) -> bool:
    """Whether `clean_caption` leaves anything; a plain word stays, so most captions need no cleaning to tell."""
    may_lose = re.search("[<%&]|click", caption, re.IGNORECASE)
    if not may_lose and any(word.lower() not in TAKEN for word in PLAIN.findall(caption)):
        return True
    return bool(caption.strip()) and bool(clean_caption(caption))


def _clean(caption: str) -> str:
    import ftfy

    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _replaced(_Text.of(_replaced(caption, LINKS)), MARKS)
    if len(re.findall("[-_]", caption)) > HYPHENS:
        caption = re.sub("[-_]", " ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return _replaced(caption, REST).strip()


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """The text of a page, as Beautiful Soup gives it: without tags, comments, scripts and styles."""

    HIDDEN = ("script", "style", "template")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.within: list[str] = []

    @classmethod
    def of(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        parser.close()
        return "".join(parser.parts)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.HIDDEN:
            self.within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.within:
            del self.within[self.within.index(tag) :]

    def handle_data(self, data: str) -> None:
        if not self.within:
            self.parts.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.startswith("cdata["):  # a caption is in lower case by now
            self.handle_data(data.removeprefix("cdata["))

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))
