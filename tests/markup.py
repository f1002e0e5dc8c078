"""A page as its elements and texts."""

from html.parser import HTMLParser

VOID = {"meta", "br", "rect", "line"}


class Reader(HTMLParser):
    """Collects elements and texts, and insists that every tag is closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.data, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        self.data.append((*(self.open[-1] if self.open else ("", {})), data))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def texts(self, tag):
        return [data for name, _, data in self.data if name == tag]
