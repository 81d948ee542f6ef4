"""How fast is the feature browser, and what does it take?

    python benchmarks/browser.py --index runs/index64k
    python benchmarks/browser.py --index runs/index1m --repeats 5 --record

The server is `saekit browse` in a process of its own, over an index such as benchmarks/synthetic_index.py writes; the
page is headless Chromium's. Times are from an event inside the page until what it asks for is painted, in ms, to the
frame of 16.7 ms: the document is looked at in each animation frame, and the first task behind the right one counts.

    command  the command itself to the first rows, in a Chromium that runs already: each time a new process, with the
             seconds until it said where it answers (`listening`) and the processor time that it took till the rows
    open     navigation to the first rows, without a cache of the browser's
    frame    from frame to frame while the list is scrolled by a wheel; drag: by its scrollbar, to random places
    rows     a jump to a random place until its rows are there
    feature  key j on a feature's page to the next feature's heading, labels and strongest contexts, with pauses in
             which the next three are prefetched; what is below and beside them follows a frame later
    search   the last letter of a word until the rows that match, less the pause that the page makes on purpose
    sort     a click on a column that was not sorted by before

`load` is the machine's in the last minute. Prints one JSON line; `--record` keeps it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import device_name, record
from playwright.sync_api import Browser, Page, sync_playwright

from sae.index_db import read_info

FLAGS = ("--no-sandbox", "--disable-gpu", "--enable-precise-memory-info", "--js-flags=--expose-gc")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
TYPING_MS, SETTLE_MS, PAUSE_MS = 150, 600, 250
SORTS = ("Density", "Max", "Output", "Δ conf.", "Entropy")
WORDS = ("ba", "de", "fi", "go", "ku", "la", "me", "no")
SCRIPT = """
const frame = () => new Promise(requestAnimationFrame);
window.changed = (test) => new Promise((done, fail) => {
  const start = performance.now();
  const painted = new MessageChannel();
  painted.port1.onmessage = () => done(performance.now() - start);
  const look = () => (test() ? painted.port2.postMessage(0)
    : performance.now() - start > 60000 ? fail(new Error("nothing changed")) : requestAnimationFrame(look));
  requestAnimationFrame(look);
});
window.frames = async (n, move) => {
  const gaps = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < n; i++) {
    move(i);
    const now = await new Promise(requestAnimationFrame);
    gaps.push(now - last);
    last = now;
  }
  return gaps;
};
window.first = () => document.querySelector(".entry:not(.head)")?.textContent ?? "";
window.isThere = () => {
  const rows = [...document.querySelectorAll(".entry:not(.head)")];
  return rows.length > 5 && rows.every((row) => row.querySelector(".says"));
};
"""
FEATURE = """() => {
  const title = () => document.querySelector("h1").textContent;
  const before = title();
  const isShown = () => !document.querySelector(".stale") && document.querySelector(".line");
  const done = changed(() => title() !== before && isShown());
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  return done;
}"""
SEARCH = """(word) => {
  const field = document.querySelector("input.search");
  const before = document.querySelector(".total").textContent + first();
  field.value = word;
  const done = changed(() => isThere() && document.querySelector(".total").textContent + first() !== before);
  field.dispatchEvent(new Event("input", { bubbles: true }));
  return done;
}"""
SORT = """(name) => {
  const before = first();
  const done = changed(() => isThere() && first() !== before);
  [...document.querySelectorAll(".head button")].find((button) => button.textContent.startsWith(name)).click();
  return done;
}"""
JUMP = """(share) => {
  const list = document.querySelector(".list");
  list.scrollTop = share * (list.scrollHeight - list.clientHeight);
  return new Promise(requestAnimationFrame).then(() => changed(isThere));
}"""
WHEEL = "(by) => { const list = document.querySelector('.list'); return frames(150, () => { list.scrollTop += by; }); }"
DRAG = """() => {
  const list = document.querySelector(".list");
  return frames(60, (i) => { list.scrollTop = ((i * 7919) % 997) / 997 * (list.scrollHeight - list.clientHeight); });
}"""


def sat_mb(process: subprocess.Popen[str]) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def start(index: Path, home: Path) -> tuple[subprocess.Popen[str], str]:
    """The server and its address."""
    begin = [sys.executable, "-c", "from steer.cli import main; main()"]
    command = [*begin, "browse", str(index), "--set", "port=0", "--set", "open=false", "--json"]
    environment = {**os.environ, "XDG_STATE_HOME": str(home)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["address"]


def blank(browser: Browser) -> Page:
    """A page that has been nowhere yet."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.add_init_script(SCRIPT)
    return context.new_page()


def opened(browser: Browser, address: str) -> tuple[Page, float]:
    """A page with its first rows, and how long that took."""
    page = blank(browser)
    page.goto(address, wait_until="commit")
    return page, page.evaluate("changed(isThere).then(() => performance.now())")


def processor_s(process: subprocess.Popen[str]) -> float:
    """Processor time of a process, in user and in system mode."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def from_command(browser: Browser, index: Path, home: Path) -> dict[str, float]:
    """Seconds from the command to the first rows."""
    page = blank(browser)
    begun = time.perf_counter()
    process, address = start(index, home)
    listening = time.perf_counter() - begun
    try:
        page.goto(address, wait_until="commit")
        page.evaluate("changed(isThere)")
        return {
            "command_s": time.perf_counter() - begun,
            "listening_s": listening,
            "command_cpu_s": processor_s(process),
        }
    finally:
        page.context.close()
        process.terminate()
        process.wait()


def once(browser: Browser, address: str, source: str) -> dict[str, list[float]]:
    """One round of everything."""
    page, open_ms = opened(browser, address)
    times: dict[str, list[float]] = {"open": [open_ms]}
    page.wait_for_timeout(SETTLE_MS)
    times["frame"] = page.evaluate(WHEEL, 90) + page.evaluate(WHEEL, 400)
    times["drag"] = page.evaluate(DRAG)
    times["rows"] = []
    for i in range(10):
        page.wait_for_timeout(PAUSE_MS)
        times["rows"].append(page.evaluate(JUMP, ((i * 617) % 1009) / 1009))
    times["sort"] = []
    for name in SORTS:
        page.wait_for_timeout(PAUSE_MS)
        times["sort"].append(page.evaluate(SORT, name))
    page.goto(address.split("#")[0] + "features")
    page.evaluate("changed(isThere)")
    times["search"] = []
    for word in WORDS:
        page.wait_for_timeout(SETTLE_MS)
        times["search"].append(page.evaluate(SEARCH, word) - TYPING_MS)
    page.goto(address.split("#")[0] + f"feature/{source}/1000?sort=max_activation&desc=1&show=live")
    page.evaluate("changed(() => document.querySelector('.line'))")
    times["feature"] = []
    for _ in range(30):
        page.wait_for_timeout(PAUSE_MS)
        times["feature"].append(page.evaluate(FEATURE))
    page.evaluate("gc()")
    times["page_mb"] = [page.evaluate("performance.memory.usedJSHeapSize") / 1e6]
    page.context.close()
    return times


def driven(browser: Browser, index: Path, home: Path, repeats: int) -> dict[str, float]:
    """What one server takes that is asked for everything, as often as wanted."""
    process, address = start(index, home)
    try:
        page, _ = opened(browser, address)
        about = page.evaluate("fetch('/api/about').then((answer) => answer.json())")["sources"][0]
        page.context.close()
        rounds = [once(browser, address, about["name"]) for _ in range(repeats)]
        return {**figures(rounds), "server_mb": round(sat_mb(process))}
    finally:
        process.terminate()
        process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, or the command alone."""
    program = os.environ.get("SAEKIT_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)))
    index, repeats = arguments.index, arguments.repeats
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        home = Path(folder)
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        begins = [from_command(browser, index, home) for _ in range(repeats)]
        rest = {} if arguments.only_command else driven(browser, index, home, repeats)
        browser.close()
    return {
        "device": device_name("cpu"),
        "latents": read_info(index)["d_sae"],
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 1),
        **{name: round(statistics.median(each[name] for each in begins), 2) for name in begins[0]},
        **rest,
    }


def figures(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians over rounds: of the middle and the 95th of a hundred of each kind."""
    line: dict[str, float] = {}
    for name in rounds[0]:
        kinds = [sorted(times[name]) for times in rounds]
        if len(kinds[0]) == 1:
            line[name if name.endswith("_mb") else f"{name}_ms"] = round(
                statistics.median(kind[0] for kind in kinds), 1
            )
            continue
        for share in (50, 95):
            middle = statistics.median(kind[min(len(kind) * share // 100, len(kind) - 1)] for kind in kinds)
            line[f"{name}_p{share}_ms"] = round(middle, 1)
    return line


def main() -> None:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Time the feature browser.")
    parser.add_argument("--index", type=Path, required=True, help="feature index")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-command", action="store_true", help="time the command to the first rows, and stop")
    parser.add_argument("--record", action="store_true", help="append to results/<device>.csv")
    arguments = parser.parse_args()
    line = measure(arguments)
    if arguments.record:
        record("browser", line)
    print(json.dumps(line))  # noqa: T201


if __name__ == "__main__":
    main()
