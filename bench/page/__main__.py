"""The live page under load: 2,000 calls that wait, of 200 workflows, on a page in Chromium.

Measured are the time from an event to its picture, the times between frames, the server's CPU for each page that is
open, and what a page receives. ``--write`` puts the figures into docs/page.md and draws docs/page.png: the page while
a support desk, an agent and callers of the gateway are served. The browser is the one that ORLA_TEST_CHROMIUM names,
else Chromium on PATH.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from bench.lib.command import DOCS, ended, finish, parser, tell, usual
from bench.lib.figures import percentile, table
from bench.lib.flags import count
from bench.page.load import PROBES, Loaded, Readers, first_bytes, loaded
from bench.page.scenario import callers, desk, research, working

PAGE, PICTURE = DOCS / "page.md", DOCS / "page.png"
WINDOW_S = 8.0
PAGES = 24
"""Open at once, for the server's CPU."""

FRAMES = """async (ms) => {
  const found = [];
  let last = performance.now();
  const until = last + ms;
  await new Promise((resolve) => {
    const step = (now) => {
      found.push(now - last);
      last = now;
      if (now < until) requestAnimationFrame(step); else resolve();
    };
    requestAnimationFrame(step);
  });
  return found.slice(1);
}"""

PAINTED = """(selector) => new Promise((resolve) => {
  const look = () => {
    if (!document.querySelector(selector)) return false;
    requestAnimationFrame(() => setTimeout(() => resolve(Date.now()), 0));
    return true;
  };
  if (look()) return;
  const watching = new MutationObserver(() => { if (look()) watching.disconnect(); });
  watching.observe(document.body, { childList: true, subtree: true, attributes: true });
})"""


def browser_path() -> str:
    """Return Chromium's program."""
    found = os.environ.get("ORLA_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise SystemExit('no Chromium here: eval "$(.ci/chromium.sh start)" installs it')
    return found


def open_page(browser: Browser, url: str, height: int = 900, **given: Any) -> Page:
    """Open the page, and wait until it shows something."""
    page = browser.new_page(viewport={"width": 1440, "height": height}, **given)
    page.goto(url + "/")
    page.wait_for_selector("[data-backend]")
    return page


def drawing_s() -> float:
    """Return the CPU time of this process's browser so far, in seconds."""
    browser = [each for each in psutil.Process().children(recursive=True) if "chrom" in each.name()]
    return sum(times.user + times.system for each in browser for times in (each.cpu_times(),))


def event_to_paint(page: Page, load: Loaded) -> list[float]:
    """Return milliseconds from sending a call to the frame with its stage."""
    found = []
    for number in range(PROBES):
        stage = f"new-{number}"
        body = {"model": "auto", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        drawn = f'[data-stage="{stage}"].is-prefill, [data-stage="{stage}"] .done:not(:empty)'
        page.evaluate(f"(drawn) => {{ window.painted = ({PAINTED})(drawn); }}", drawn)
        sent_ms = time.time() * 1000
        headers = {"x-orla-workflow-run": "probe", "x-orla-stage": stage}
        httpx.post(f"{load.url}/v1/chat/completions", json=body, headers=headers)
        found.append(page.evaluate("window.painted") - sent_ms)
        time.sleep(0.15)
    return found


def measured(waiting: int, workflows: int) -> list[str]:
    """Return the figures."""
    tell(f"waiting until {waiting:,} calls wait ...")
    with loaded(waiting, workflows) as load:
        tell("the server's CPU ...")
        alone = load.cpu_of(WINDOW_S)
        with Readers(load.url, 1) as one:
            with_one, seconds = load.cpu_of(WINDOW_S), WINDOW_S
            rate, messages = one.bytes / seconds, one.messages / seconds
        with Readers(load.url, PAGES):
            with_many = load.cpu_of(WINDOW_S)
        first = first_bytes(load.url)
        tell("the page in Chromium ...")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
            page = open_page(browser, load.url)
            time.sleep(2.0)
            before_s = drawing_s()
            time.sleep(WINDOW_S)
            drawing = (drawing_s() - before_s) / WINDOW_S
            frames = page.evaluate(FRAMES, WINDOW_S * 1000)
            painted = event_to_paint(page, load)
            browser.close()
        still = int(str(load.state()["waiting"]))
    each = (with_many - with_one) / (PAGES - 1)
    rows = [
        [
            "from an event to its picture",
            f"{statistics.median(painted):.0f} ms",
            f"{percentile(painted, 0.95):.0f} ms",
        ],
        ["from frame to frame", f"{statistics.median(frames):.1f} ms", f"{percentile(frames, 0.95):.1f} ms"],
        ["frames that took more than 50 ms", f"{sum(ms > 50 for ms in frames)} of {len(frames)}", ""],
        ["the browser's CPU for the page", f"{100 * drawing:.1f} % of a core", ""],
        ["received by a page", f"{rate / 1000:.1f} kB/s, {messages:.0f} messages/s", ""],
        ["received at its beginning", f"{first / 1000:.0f} kB", ""],
        ["the server's CPU, no page open", f"{100 * alone:.1f} % of a core", ""],
        ["added by the first page", f"{100 * (with_one - alone):.1f} %", ""],
        ["added by each further one", f"{100 * each:.1f} %" if each >= 0.001 else "below 0.1 %", ""],
    ]
    said = f"{still:,} calls waited, of {workflows} workflows in 12 stages; 40 ended each second."
    return [said, "", *table(["", "median", "95 %"], rows)]


def picture(path: Path) -> None:
    """Draw the page while it has something to show."""
    tell("the picture ...")
    with working() as work:
        work.start(lambda work: desk(work, 9), lambda work: research(work, 5), callers)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
            page = open_page(browser, work.served.url, 1020, color_scheme="light")
            time.sleep(20.0)
            page.locator("#workflow-list button", has_text="ticket").first.click()
            page.mouse.move(0, 0)
            page.evaluate("scrollTo(0, 0); document.getElementById('workflow-list').scrollTop = 0")
            time.sleep(8.0)
            page.screenshot(path=path)
            browser.close()


def main() -> int:
    """Measure."""
    options = parser("page", __doc__)
    usual(options, writes="the figures into docs/page.md, and docs/page.png")
    options.add_argument("--waiting", type=count, default=2_000, metavar="N", help="so many calls wait (2,000)")
    options.add_argument("--workflows", type=count, default=200, metavar="N", help="of so many workflows (200)")
    options.add_argument("--picture", action="store_true", help="draw docs/page.png alone")
    chosen = options.parse_args()
    if chosen.picture or chosen.write:
        picture(PICTURE)
    if chosen.picture:
        return 0
    return finish(measured(chosen.waiting, chosen.workflows), "page", PAGE if chosen.write else None)


if __name__ == "__main__":
    sys.exit(ended(main, "nothing is kept"))
