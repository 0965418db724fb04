"""The numbers that a page shows."""

from __future__ import annotations

import html
import re


def numbers(page: str) -> set[str]:
    """All of them in text, tables and tooltips, as they are written; ticks of charts are a matter of taste."""
    body = re.sub(r'base64,[^"]+', "", page[page.index("<body>") :])
    body = re.sub(r"<text\b.*?</text>", " ", body.replace("<wbr>", ""), flags=re.DOTALL)
    told = " ".join(re.findall(r'(?:title|aria-label)="([^"]*)"', body) + re.findall(r"<title>(.*?)</title>", body))
    text = html.unescape(html.unescape(re.sub(r"<[^>]+>", " ", body) + " " + told))
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))
