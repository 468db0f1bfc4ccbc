"""Pictures of a report, for the documentation: `python tools/screenshots.py RUN PICTURE.png [--width 1200] [--dark]`.

Needs a Chromium, as `make test-browser` sees to one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from longrope.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, help="of the page's upper part; the whole page by default")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    path = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report(args.run, Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        size = {"width": args.width, "height": args.height or 900}
        page = browser.new_page(viewport=size, color_scheme="dark" if args.dark else "light")  # type: ignore[arg-type]
        page.goto(page_file.as_uri())
        page.wait_for_selector(".plot .main-svg")
        page.wait_for_timeout(1000)
        page.screenshot(path=args.picture, full_page=args.height is None)
        browser.close()


if __name__ == "__main__":
    main()
