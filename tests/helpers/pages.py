"""An HTML page taken apart."""

import json
from html.parser import HTMLParser

HOSTILE = "</script><script>window.__pwned=1</script><img src=x onerror=window.__pwned=2>&amp;$x$"


class Page(HTMLParser):
    """Elements of a page, its text, and what is inside its scripts."""

    def __init__(self, path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.scripts, self.cells = [], [], [], []
        self.words, self._inside = [], ""
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.words.append(data)
            if self._inside == "td":
                self.cells.append(data)

    @property
    def figures(self) -> dict:
        return json.loads(self.scripts[0])["figures"]
