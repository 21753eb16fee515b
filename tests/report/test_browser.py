"""The page in a real browser: drawn, silent, self-contained, and no wider than the screen."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from made_ranks import add_ranks, make_collectives, make_doctor, make_gemm, make_io, make_plan, make_scaling, make_step
from made_run import make_run

from tozan import report

FACTS = """
(() => {
  const shown = [...document.querySelectorAll("figure")].map(figure => {
    const drawn = [...figure.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 0);
    const curves = drawn.flatMap(svg => [...svg.querySelectorAll("path, use")]).filter(mark => {
      const box = mark.getBoundingClientRect();
      const style = getComputedStyle(mark);
      return box.width + box.height > 0 && (style.stroke !== "none" || style.fill !== "none");
    });
    const texts = drawn.flatMap(svg => [...svg.querySelectorAll("text")]).map(text => text.getBoundingClientRect());
    const overlaps = texts.flatMap((a, i) => texts.slice(i + 1).filter(b =>
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)).length;
    const outside = texts.filter(box => box.left < 0 || box.right > innerWidth).length;
    const size = drawn.length ? parseFloat(getComputedStyle(drawn[0].querySelector("text")).fontSize)
      * drawn[0].getBoundingClientRect().width / drawn[0].viewBox.baseVal.width : 0;
    return {id: figure.id, drawings: drawn.length, marks: curves.length, texts: texts.length, overlaps, outside, size};
  });
  const root = document.documentElement;
  return JSON.stringify({shown, overflow: root.scrollWidth - root.clientWidth,
                         paper: getComputedStyle(document.body).backgroundColor});
})()
"""


class Browser:
    """Headless Chromium spoken to over a pipe in the DevTools protocol."""

    def __init__(self, program: str, profile: str) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        command = [program, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._count, self.events = b"", 0, []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **values: object) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": values}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser has gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found

    def open(self, address: str, width: int, dark: bool) -> dict:
        """Load a page at a width; what the script `FACTS` finds there, and the events meanwhile."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()
        facts = json.loads(self.send("Runtime.evaluate", expression=FACTS)["result"]["value"])
        return facts | {"events": list(self.events)}

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    opened = Browser(program, str(tmp_path_factory.mktemp("profile")))
    yield opened
    opened.close()


PAGES = {
    "run": ["loss", "throughput", "phases", "gradient-norm", "learning-rate"],
    "ranks": ["loss", "throughput", "phases", "ranks", "pipeline", "transfers", "gradient-norm", "learning-rate"],
    "bench": [
        *("roofline", "collectives", "reads", "read-latency", "step", "strong-scaling", "strong-breakdown"),
        *("products", "buffers"),
    ],
    "plan": ["layouts", "plan-breakdown", "memory", "pipeline", "torus", "strong-curve"],
}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """One page of each kind."""
    base = tmp_path_factory.mktemp("pages")
    for make, name in (
        (make_gemm, "g"),
        (make_collectives, "c"),
        (make_io, "i"),
        (make_doctor, "d"),
        (make_step, "p"),
        (make_scaling, "s"),
    ):
        make(base / "bench" / f"{name}.json")
    make_run(base / "run")
    add_ranks(make_run(base / "ranks"), 64, 40)
    make_plan(base / "plan")
    return {name: report.write(base / name).as_uri() for name in PAGES}


@pytest.mark.skipif(sys.platform == "win32", reason="the browser is spoken to over inherited pipes")
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (2560, True)])
def test_a_page_is_drawn_silent_and_fits(browser, addresses, name, width, dark):
    facts = browser.open(addresses[name], width, dark)
    assert [figure["id"] for figure in facts["shown"]] == PAGES[name]
    for figure in facts["shown"]:
        assert figure["drawings"] == 1, figure
        assert figure["marks"] >= 3, figure
        assert figure["texts"] >= (1 if figure["id"] == "torus" else 4), figure
        assert figure["overlaps"] == 0, figure
        assert figure["outside"] == 0, figure
        assert figure["size"] >= 9, figure
    assert facts["overflow"] <= 0
    assert facts["paper"] == ("rgb(21, 24, 27)" if dark else "rgb(252, 252, 250)")
    methods = {event["method"] for event in facts["events"]}
    assert not methods & {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    asked = [e["params"]["request"]["url"] for e in facts["events"] if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [addresses[name]]


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_finds_words_for_each_figure(browser, addresses, name):
    browser.open(addresses[name], 1280, dark=False)
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    names = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") in ("image", "img")]
    assert len(names) == len(PAGES[name])
    assert all(len(text) > 40 for text in names), "title and description are read out"
