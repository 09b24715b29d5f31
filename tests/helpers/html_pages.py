"""The text and the tables of a page."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Text of the page, and its tables as {caption: [[cell, ...], ...]}."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.tags, self.text, self.caption = {}, [], "", ""
        self.sink = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self.caption, self.sink = "", "caption"
        elif tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        elif tag in ("th", "td"):
            self.tables[self.caption][-1].append("")
            self.sink = "cell"
        elif tag == "small" and self.sink == "cell":
            self.tables[self.caption][-1][-1] += " "

    def handle_endtag(self, tag):
        if tag in ("caption", "th", "td"):
            self.sink = None

    def handle_data(self, data):
        self.text += data
        if self.sink == "caption":
            self.caption += data
        elif self.sink == "cell":
            self.tables[self.caption][-1][-1] += data

    def table(self, start):
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return {row[0]: row[1:] for row in found}
