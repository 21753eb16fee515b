"""How long the page of a long run of many ranks takes to write and to open.

    python benchmarks/report_page.py --steps 10000 --ranks 64

The run is made from formulas by the tests' helpers; the page is written by `tozan report` in a process of its own, and
opened in headless Chromium three times.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE / "tests" / "helpers"), str(HERE / "tests" / "report")]

from made_ranks import add_ranks  # noqa: E402
from made_run import make_run  # noqa: E402
from test_browser import Browser  # noqa: E402


def main() -> None:
    """Make, write, open; print seconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = add_ranks(make_run(Path(folder) / "run", options.steps), options.ranks, options.steps)
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tozan", "report", str(run)], check=True)
        page = run / "report.html"
        print(f"written in {time.perf_counter() - begin:.2f} s, {page.stat().st_size / 1e6:.1f} MB")
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise SystemExit("needs Chromium to open it")
        browser = Browser(program, str(Path(folder) / "profile"))
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            browser.open(page.as_uri(), 1280, dark=False)
            took.append(time.perf_counter() - begin)
        browser.close()
        print(f"opened in {statistics.median(took):.2f} s (median of 3, to the load event and one look at the layout)")


if __name__ == "__main__":
    main()
