"""Checks of the built site that mkdocs doesn't make: it must be whole without a network."""

import re

from mkdocs.exceptions import PluginError

REMOTE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def on_post_page(output, page, config):
    """Refuse scripts, styles, fonts and pictures of other hosts."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_path} needs another host: {found[0]}")
    return output
