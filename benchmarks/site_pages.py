"""Every page of the site, and of each kind of report, in a real browser at three widths, light and dark.

``make docs``, ``pip install '.[browser]'``, a Chromium (Debian: ``apt-get install chromium``; another one by the variable
CHROMIUM), then ``python benchmarks/site_pages.py``. Looked for at each view: what is cut off or wider than the window, letters
under 11 pixels, pictures without a description or dark on dark, what axe calls serious or critical, messages on the console,
requests for what is not the site's, and what would be printed dark; and links that lead nowhere. Any of them fails the run.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

from report_page import chromium
from report_page import pages as reports

SITE = Path(__file__).parent.parent / "docs" / "_build"
VIEWS = [(width, scheme) for width in (390, 1366, 1920) for scheme in ("light", "dark")]
HERE = ("file", "data")  # what a page may ask for

#: How bright what lies behind an element is, from 0 to 1.
SHADE = """() => {
  window.shade = (one) => {
    for (let above = one; above; above = above.parentElement) {
      const [r, g, b, a] = getComputedStyle(above).backgroundColor.match(/[\\d.]+/g).map(Number);
      if (a !== 0) return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
    }
    return 1;
  };
}"""

#: What one view shows amiss, as sentences. Text in a box that scrolls is not cut off; a figure's letters shrink with it.
PROBE = """() => {
  const found = new Set(), root = document.documentElement;
  const seen = (one) => one.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const said = (one) => `${one.nodeName.toLowerCase()} "${(one.textContent || one.src || "").trim().slice(0, 40)}"`;
  if (root.scrollWidth > innerWidth) found.add(`the page is ${root.scrollWidth} px wide`);
  for (const one of document.querySelectorAll("nav"))
    if (seen(one) && one.clientWidth > 1 && one.scrollWidth > one.clientWidth + 1) found.add(`moved sideways: ${said(one)}`);
  const cut = (one, box) => {
    if (box.width <= 1 || box.right <= 0) return false;
    for (let above = one.parentElement; above && above !== root; above = above.parentElement) {
      const own = above.getBoundingClientRect(), style = getComputedStyle(above), way = style.overflowX;
      if (way === "auto" || way === "scroll" || style.textOverflow === "ellipsis") return false;
      if (way !== "visible" && above !== document.body && box.right > own.right + 1.5) return own.width > 1;
    }
    return box.right > innerWidth + 1.5;
  };
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = words.nextNode(); node; node = words.nextNode()) {
    const one = node.parentElement;
    if (!node.data.trim() || !seen(one) || one.closest("script, style, .visually-hidden")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    if (cut(one, range.getBoundingClientRect())) found.add(`cut off: ${said(one)}`);
    const scale = one.ownerSVGElement ? Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b) : 1;
    const size = parseFloat(getComputedStyle(one).fontSize) * scale;
    if (size < 10.95) found.add(`letters of ${size.toFixed(1)} px: ${said(one)}`);
  }
  for (const one of document.images) {
    if (!seen(one)) continue;
    if (cut(one, one.getBoundingClientRect())) found.add(`cut off: ${said(one)}`);
    if (!one.naturalWidth) found.add(`no picture at ${one.src}`);
    if (!one.alt.trim() || /\\.(png|svg)$/.test(one.alt)) found.add(`no description: ${one.src.split("/").pop()}`);
    const canvas = document.createElement("canvas"), paint = canvas.getContext("2d");
    canvas.width = canvas.height = 200;
    paint.drawImage(one, 0, 0, 200, 200);
    const clear = paint.getImageData(0, 0, 200, 200).data.filter((value, i) => i % 4 === 3 && value < 128).length;
    if (clear > 400 && shade(one) < 0.5) found.add(`dark on dark: ${one.src.split("/").pop()}`);
  }
  return [...found];
}"""

#: How bright the page is that would be printed.
PRINTED = """() => {
  dispatchEvent(new Event("beforeprint"));
  return shade(document.body);
}"""

#: Names within a page, and where its links lead.
TARGETS = """() => ({
  names: [...document.querySelectorAll("[id], a[name]")].map((one) => one.id || one.name),
  links: [...document.querySelectorAll("a[href]")].map((one) => one.href),
})"""


def views(browser: Browser, path: Path, shots: Path | None) -> Iterator[tuple[str, Any, Any]]:
    """Of each view its name, what is amiss, and the page's names and links. A page is loaded anew for each width."""
    for width, scheme in VIEWS:
        found: list[str] = []
        if scheme == VIEWS[0][1]:
            page = browser.new_page(viewport={"width": width, "height": 900})
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(_warned(message)))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.emulate_media(color_scheme=scheme)
            page.goto(path.as_uri())
            page.evaluate(SHADE)
        page.emulate_media(color_scheme=scheme)
        if shots is not None:
            page.screenshot(path=f"{shots}-{width}-{scheme}.png", full_page=True)
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        found += page.evaluate(PROBE)
        for one in Axe().run(page, options={"preload": False}).response["violations"]:
            if one["impact"] in ("serious", "critical"):
                places = {" ".join(map(str, node["target"])) for node in one["nodes"]}
                found.append(f"{one['impact']}: {one['id']} at {'; '.join(sorted(places))[:200]}")
        found += [f"console: {one}" for one in said if one]
        found += [f"asks for {one}" for one in asked if urlsplit(one).scheme not in HERE]
        if scheme == "dark":
            page.emulate_media(media="print", color_scheme=scheme)
            found += ["printed dark"] if page.evaluate(PRINTED) < 0.5 else []
        yield f"{width} {scheme}", found, page.evaluate(TARGETS)
        if scheme == VIEWS[-1][1]:
            page.close()


def _warned(message: Any) -> str:
    """What stands on the console, but for what is only noted there."""
    return message.text if message.type in ("error", "warning") else ""


def dead(targets: dict[Path, Any], root: Path) -> list[tuple[Path, str]]:
    """Links between pages of a folder, and within one, that lead nowhere."""
    names = {path: set(has["names"]) for path, has in targets.items()}
    found = []
    for path, has in targets.items():
        for link in has["links"]:
            where = urlsplit(link)
            if where.scheme != "file":
                continue
            to, name = Path(unquote(where.path)), unquote(where.fragment)
            if not to.is_file() or not to.is_relative_to(root):
                found.append((path, f"leads nowhere: {link}"))
            elif name and name not in names.get(to, {name}):
                found.append((path, f"no such place: {to.name}#{name}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, nargs="?", default=SITE, help="the built site")
    parser.add_argument("--only", nargs="*", help="pages whose name has one of these in it")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--shots", type=Path, help="leave a picture of each view in this folder")
    options = parser.parse_args()
    browser_path = chromium()
    site = options.site.resolve()
    amiss: dict[str, list[str]] = defaultdict(list)
    looked = 0
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        pages = {str(path.relative_to(site)): path for path in sorted(site.rglob("*.html"))}
        pages = {name: path for name, path in pages.items() if not name.startswith("_")}
        if not pages:
            raise SystemExit(f"no page in {site}: `make docs` builds the site")
        pages |= {f"report: {kind}": path for kind, path in reports(Path(folder)).items()}
        if options.only:
            pages = {name: at for name, at in pages.items() if any(o in name for o in options.only)}
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--allow-file-access-from-files"]
        )
        targets = {}
        for name, path in pages.items():
            shots = options.shots and options.shots / name.replace("/", "_").replace(" ", "-")
            for at, found, has in views(browser, path, shots):
                targets[path] = has
                looked += 1
                for what in found:
                    amiss[f"{name}: {what}"].append(at)
        browser.close()
        names = {path: name for name, path in pages.items()}
        for path, what in dead(targets, site) if not options.only else []:
            if path.is_relative_to(site):
                amiss[f"{names[path]}: {what}"].append("every view")
    print(f"{len(pages)} pages, {looked} views, {len(amiss)} findings")
    for what, where in amiss.items():
        print(f"{what} ({', '.join(where) if len(where) < len(VIEWS) else 'every view'})")
    if options.json is not None:
        figures = {"pages": len(pages), "views": looked, "amiss": amiss}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if amiss:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
