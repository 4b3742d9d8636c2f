"""The web page in a real browser: Chromium without a display, driven by Playwright.

`scripts/test_web.sh` runs this file. With LLAVA_MOLE_WEB_SHOTS=DIR it leaves screenshots there, and with
LLAVA_MOLE_WEB_RUNS="RUN RUN2" it also takes some of trained runs.
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SHOTS = os.environ.get("LLAVA_MOLE_WEB_SHOTS", "")
RUNS = os.environ.get("LLAVA_MOLE_WEB_RUNS", "").split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
]


class Server:
    """`python -m llava_mole.serve.gradio_app` with runs, on one port through restarts."""

    def __init__(self, runs: list[str], *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        first, *others = runs
        self._command = [sys.executable, "-W", "ignore", "-m", "llava_mole.serve.gradio_app", "--model-path", first]
        for other in others:
            self._command += ["--compare", other]
        self._command += ["--device", "cpu", "--port", str(self.port), *options]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        printed = ""
        for line in self.process.stdout:
            printed += line
            if line.startswith("page: "):
                return
        raise AssertionError(printed)

    def stop(self) -> str:
        """Stop it as Ctrl-C does. Returns what it has printed since the start."""
        self.process.send_signal(signal.SIGINT)
        printed, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, printed
        return printed


@pytest.fixture
def server(mole_run: Path, chat_run: Path) -> Iterator[Server]:
    """A mixture and plain LoRA, both untrained: they write until their limit."""
    running = Server([f"mole={mole_run}", f"mix={chat_run}"], "--max-new-tokens", "8")
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.communicate()


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Page:
    """An open page, by what people do on it."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options})
        self.page.set_default_timeout(20_000)
        self.hosts: set[str] = set()
        self.dialogs: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+:)(//[^/]*)?.*", r"\1\2", request.url)))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)
        self.page.wait_for_selector("#box textarea")

    def ask(self, text: str, *files: Path, wait: bool = True) -> None:
        """Upload files, write a question and send it."""
        if files:
            with self.page.expect_file_chooser() as chooser:
                self.page.locator("#box [data-testid=upload-button]").click()
            chooser.value.set_files([str(file) for file in files])
            self.page.wait_for_selector(".thumbnail-item, .thumbnail-image, #box img")
        self.page.locator("#box textarea").fill(text)
        self.page.locator("#box [data-testid=submit-button]").click()
        if wait:
            self.wait_for_routing_of(text)

    def wait_for_routing_of(self, question: str) -> None:
        """Until the panel shows this question's tokens, which is when all sides have answered it."""
        self.page.wait_for_function("text => document.querySelector('#panel').innerText.includes(text)", arg=question)
        self.page.wait_for_selector("#box [data-testid=submit-button]")

    def set_longest(self, tokens: int) -> None:
        """Set the longest answer, and wait until the page has taken it over."""
        number = self.page.get_by_label("number input for Longest answer in tokens")
        number.fill(str(tokens))
        number.press("Tab")
        self.page.wait_for_function(
            "n => [...document.querySelectorAll('input[type=range]')].some(e => e.value === n)", arg=str(tokens)
        )
        self.page.wait_for_timeout(300)

    def texts(self, role: str, side: int = 0) -> list[str]:
        """The messages of a role on a side."""
        found = self.page.locator(".chat").nth(side).locator(f"[data-testid={role}]").all_inner_texts()
        return [text.strip() for text in found if text.strip()]

    def experts(self, of: str = "rect") -> list[str]:
        """The experts of all patches (`rect`) or tokens (`.mole-token`) that are shown."""
        return self.page.locator(f"#panel {of}").evaluate_all("all => all.map(e => e.dataset.expert)")

    def shoot(self, name: str, *, whole: bool = True) -> None:
        """Leave a screenshot, if they are wanted."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=whole)


def test_a_person_at_the_page(server: Server, browser: Any, photo: str, tmp_path: Path) -> None:
    page = Page(browser, server.address)
    page.shoot("start")
    # Upload, ask, stream: two models, an answer each, and the routing of the mixture.
    page.ask("What is this?", Path(photo))
    page.page.wait_for_selector("#panel .mole-overlay")
    assert page.texts("user")[-1] == "What is this?"
    assert page.texts("bot", 0)
    assert page.texts("bot", 1)
    voted = page.experts()
    assert len(voted) == 4  # the miniature tower's patches
    # The slider: each layer has its own picture.
    by_layer = []
    slider = page.page.locator("#layer input[type=range]")
    for key in ("ArrowRight", "ArrowLeft"):
        slider.press(key)
        value = slider.input_value()
        page.page.wait_for_selector(f"#panel .mole-about:has-text('layer {value}')")
        by_layer.append((value, page.experts(), page.experts(".mole-token")))
    assert [value for value, *_ in by_layer] == ["1", "0"]
    assert not page.page.locator("#together input").is_checked()
    assert by_layer[0][1:] != by_layer[1][1:]
    # Every expert alone.
    page.page.locator("#compare").click()
    page.page.wait_for_function("document.querySelectorAll('#compared td.mole-answer').length === 3 && "
                                "!document.querySelector('#compared').innerText.includes('…')")  # fmt: skip
    assert page.page.locator("#compared tr").first.locator(".mole-answer").inner_text() == page.texts("bot", 0)[-1]
    page.shoot("compare")
    # A script tag is text, in the chat and among the tokens.
    page.ask("<script>alert(1)</script><img src=x onerror=alert(2)> why?")
    assert page.texts("user")[-1].startswith("<script>alert(1)</script><img src=x")
    assert "<script>" in page.page.locator("#panel .mole-tokens").last.inner_text()
    assert not page.dialogs
    # A message of 60 megapixels is refused in words, and the page goes on.
    large = tmp_path / "large.png"
    Image.new("1", (10_000, 6_000)).save(large)
    page.ask("And this?", large, wait=False)
    page.page.wait_for_selector("text=large.png: the image has 10000 x 6000 pixels; at most 50,000,000 are allowed")
    page.shoot("refused", whole=False)
    assert page.page.locator("#box textarea").input_value() == "And this?"
    assert len(page.texts("user")) == 2
    # Stop: a long answer ends where it is, and counts.
    page.page.reload()
    page.page.wait_for_selector("#box textarea")
    page.page.get_by_text("Parameters").click()
    page.set_longest(420)
    page.ask("Tell me everything.", wait=False)
    page.page.wait_for_function("document.querySelector('.chat [data-testid=bot]')?.innerText.length > 20")
    page.page.locator("#box button.stop-button").click()
    page.wait_for_routing_of("Tell me everything.")
    page.page.wait_for_selector(".mole-note:has-text('stopped')")
    assert 20 < len(page.texts("bot")[-1]) < 3000
    page.set_longest(6)
    # Edit and retry.
    page.page.locator(".chat").first.get_by_label("Edit").last.click()
    page.page.locator(".chat").first.locator("textarea").fill("Tell me less.")
    page.page.locator(".chat").first.get_by_label("Submit").click()
    page.wait_for_routing_of("Tell me less.")
    assert page.texts("user", 1) == ["Tell me less."]
    answer = page.texts("bot", 1)[-1]
    page.set_longest(2)
    page.page.locator(".chat").first.get_by_label("Retry").last.click()
    page.page.wait_for_function(
        "before => { const side = document.querySelectorAll('.chat')[1];"
        " const now = [...side.querySelectorAll('[data-testid=bot]')].pop();"
        " return now && now.innerText.trim() !== before && now.innerText.trim() !== '…'; }",
        arg=answer,
    )
    page.page.wait_for_timeout(300)
    page.page.wait_for_selector("#compare:not([disabled])")
    assert len(page.texts("bot", 1)) == 1
    assert len(page.texts("bot", 1)[-1]) < len(answer)
    # Nothing was asked of anybody else.
    assert {host for host in page.hosts if not host.startswith(("data:", "blob:"))} == {server.address.rstrip("/")}
    # A narrow screen, dark: nothing sticks out.
    page.page.locator("#theme").click()
    page.page.set_viewport_size({"width": 400, "height": 800})
    page.page.wait_for_timeout(300)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.page.locator("#box").bounding_box()["width"] > 340
    # The server starts again under the open page, which goes on with a new conversation.
    printed = server.stop()
    assert "Traceback" not in printed, printed
    server.start()
    time.sleep(1)
    page.page.wait_for_selector("#box textarea")
    page.ask("Are you there?")
    page.page.wait_for_function(
        "[...document.querySelectorAll('.chat')].every(c => c.innerText.includes('Are you there?'))"
    )
    assert page.texts("user") == ["Are you there?"]
    assert page.texts("bot")
    # A page that is closed leaves nothing running.
    page.page.close()
    assert "Traceback" not in server.stop()


@pytest.mark.skipif(not (RUNS and SHOTS), reason="for screenshots of trained runs")
def test_pictures_of_trained_runs(browser: Any) -> None:
    server = Server(RUNS)
    try:
        page = Page(browser, server.address)
        page.shoot("runs_start")
        page.page.locator("#examples button").nth(1).click()
        page.page.wait_for_selector("#box img")
        page.page.locator("#box [data-testid=submit-button]").click()
        page.page.wait_for_selector("#panel .mole-overlay")
        page.shoot("runs_light")
        page.page.locator("#layer input[type=range]").press("ArrowRight")
        page.page.wait_for_selector("#panel .mole-about:has-text('layer 1')")
        page.page.locator("#compare").click()
        page.page.wait_for_function("document.querySelectorAll('#compared td.mole-answer').length > 1 && "
                                    "!document.querySelector('#compared').innerText.includes('…')")  # fmt: skip
        page.shoot("runs_compare")
        page.page.locator("#theme").click()
        page.shoot("runs_dark")
        page.page.set_viewport_size({"width": 400, "height": 800})
        page.shoot("runs_narrow_dark")
        page.page.locator("#theme").click()
        page.shoot("runs_narrow")
    finally:
        server.stop()
