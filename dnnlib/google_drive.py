"""Google Drive's links, and its page that asks to confirm the download of a large file."""

from __future__ import annotations

import html.parser
import re
import urllib.parse

HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com')


def download_address(url: str) -> str:
    """The download address behind a Google Drive link of any form; other URLs as they are."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in HOSTS or parts.path.endswith('/download'):
        return url
    ids = re.findall(r'/d/([\w-]+)', parts.path) + urllib.parse.parse_qs(parts.query).get('id', [])
    return f'{parts.scheme}://{parts.netloc}/uc?export=download&id={ids[0]}' if ids else url


class ConfirmationForm(html.parser.HTMLParser):
    """The form on the page "too large to be scanned for viruses": address and hidden fields.

    Its id is `download-form`; older pages have `downloadForm`, or a link `uc-download-link`.

    Args:
        page: HTML.
    Attributes:
        action: address, possibly relative; None on any other page.
        fields: {name: value} to send there.
    """

    def __init__(self, page: str):
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == 'form' and attributes.get('id') in ('download-form', 'downloadForm'):
            self.action = attributes.get('action')
        elif tag == 'a' and attributes.get('id') == 'uc-download-link':
            self.action = attributes.get('href')
        elif tag == 'input' and self.action is not None and attributes.get('name'):
            self.fields[attributes['name']] = attributes.get('value') or ''
