#!/usr/bin/env python3
"""Checks the Markdown files of the repository: relative links and their anchors resolve, and lines of prose are not too long.

    check-links.py [FOLDER]
"""

import pathlib
import re
import subprocess
import sys

COLUMNS_MAX = 120
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)|^\[[^\]]+\]:\s+(\S+)", re.M)
FENCE = re.compile(r"^ *(```|~~~)")


def prose(text):
    """The lines outside of code blocks, with their numbers."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            is_code = not is_code
        elif not is_code:
            yield number, line


def anchors(text):
    """The anchors that the headings of a page have on GitHub and Forgejo."""
    found = {}
    for _, line in prose(text):
        if heading := re.match(r"#{1,6} +(.*?) *#*$", line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            count = found.setdefault(slug, 0)
            found[slug] += 1
            yield slug if count == 0 else f"{slug}-{count}"


def problems(root, page):
    text = page.read_text(encoding="utf-8")
    for number, line in prose(text):
        where = f"{page.relative_to(root)}:{number}"
        if len(line) > COLUMNS_MAX and not line.lstrip().startswith("|") and "](" not in line and "]: " not in line:
            yield f"{where}: {len(line)} columns; allowed are {COLUMNS_MAX}"
        for match in LINK.finditer(re.sub(r"`[^`]*`", "", line)):
            link = match[1] or match[2]
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                yield f"{where}: {link}: no such file"
            elif anchor and target.suffix == ".md" and anchor not in set(anchors(target.read_text(encoding="utf-8"))):
                yield f"{where}: {link}: no such heading"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent).resolve()
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=root, check=True, capture_output=True, text=True)
    pages = [root / name for name in listed.stdout.splitlines() if (root / name).exists()]
    found = [problem for page in pages for problem in problems(root, page)]
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(pages)} pages, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
