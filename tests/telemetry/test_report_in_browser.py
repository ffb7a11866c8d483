"""The report in a real headless Chromium: what a person sees, what a hostile model cannot do, how long it takes."""

import os
import shutil
import threading
import time

import pytest

from open_agentrl_jax.telemetry import report
from open_agentrl_jax.telemetry.server import make_server

from .runs import add_tokenizer, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    "<svg onload='window.hacked = 1'><a href='javascript:window.hacked = 1'>click</a>"
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>"
)
REQUEST_SCRIPT = (
    "() => { const s = document.createElement('script'); s.text = 'window.hacked = 2'; document.body.append(s); }"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    made = browser.new_page(viewport={"width": 1400, "height": 900})
    made.faults = []
    made.on("pageerror", lambda error: made.faults.append(str(error)))
    made.requests_made = []
    made.on("request", lambda request: made.requests_made.append(request.url))
    made.set_default_timeout(20_000)
    yield made
    made.close()


def until(page, expression):
    """Waits for it from outside: the page's policy lets no string be evaluated inside."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def open_file(page, path):
    page.goto(path.as_uri())
    page.wait_for_selector("nav button")


def test_curves_and_their_range_choose_the_steps_of_the_browser(tmp_path, page):
    open_file(page, report.write_report([write_run(tmp_path, steps=40)]))
    page.wait_for_selector(".panel canvas")
    titles = page.locator(".panel figcaption").all_text_contents()
    assert {"Accuracy", "Reward", "Entropy (nats)", "Time of a step (s)"} <= set(titles)
    assert "held-out accuracy 0.200 → 0.900" in page.locator(".summary").text_content()
    over = page.locator(".panel .u-over").nth(1)
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    until(page, "document.querySelectorAll('.panel .u-legend')[1].textContent.includes('0.5')")  # hover
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=4)
    page.mouse.up()
    until(page, "document.querySelector('input[aria-label=\"first step\"]').value !== ''")
    low = int(page.get_by_label("first step").input_value())
    high = int(page.get_by_label("last step").input_value())
    assert 18 <= low <= 23 and 28 <= high <= 33
    page.get_by_role("tab", name="Trajectories").click()
    expected = 6 * (high - low + 1)
    assert page.locator(".browser > .note").text_content().startswith(f"{expected} trajectories of 252")
    assert not page.faults


@pytest.mark.parametrize(
    "ticks, expected",
    [
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 0.001, 0.002], ["0.000", "0.001", "0.002"]),  # a clip share
        ([-5e-7, 0, 5e-7], ["-5.0e-7", "0", "5.0e-7"]),
        ([2000, 4000], ["2000", "4000"]),
        ([0, 2e6], ["0", "2.0e+6"]),
    ],
)
def test_marks_of_an_axis_differ(tmp_path, page, ticks, expected):
    open_file(page, report.write_report([write_run(tmp_path, steps=2)]))
    assert page.evaluate(f"marks({ticks})") == expected


def test_a_trajectory_is_a_chat_with_code_and_tokens(tmp_path, page):
    write_run(tmp_path)
    add_tokenizer(tmp_path)
    open_file(page, report.write_report([tmp_path]))
    page.get_by_role("tab", name="Trajectories").click()
    page.locator(".line").first.click()
    page.wait_for_selector(".trajectory")
    assert page.locator("pre.code").text_content() == "print(6 * 7)"
    assert page.locator("pre.output").text_content() == "42"
    assert page.locator(".stream").count() == 0  # on demand
    page.get_by_role("button", name="tokens").click()
    page.wait_for_selector(".stream span")
    assert page.locator(".stream span").count() == 12
    assert page.locator(".stream .masked").count() == 6
    page.locator(".stream .sampled").nth(1).hover()
    assert "<b>bold</b>" in page.locator(".tip").text_content()  # the text of id 0, as text
    assert (
        "weight version 1" in page.locator(".tip").text_content()
        and "log-prob -" in page.locator(".tip").text_content()
    )
    page.get_by_role("button", name="its group of 3").click()
    page.wait_for_selector(".columns")
    assert page.locator(".columns .trajectory").count() == 3
    assert page.locator(".columns h3 .verdict").all_text_contents() == ["wrong", "right", "right"]
    assert not page.faults


def test_filters(tmp_path, page):
    open_file(page, report.write_report([write_run(tmp_path)]))
    page.get_by_role("tab", name="Trajectories").click()
    count = page.locator(".browser > .note")
    page.get_by_label("phase").select_option("eval")
    assert count.text_content().startswith("12 ")
    page.get_by_label("problem", exact=True).fill("problem 1")
    assert count.text_content().startswith("6 ")
    page.get_by_label("reward to").fill("0")
    assert count.text_content().startswith("2 ")
    page.get_by_label("calls from").fill("2")
    assert count.text_content().startswith("0 ")
    page.get_by_label("calls from").fill("")
    page.get_by_label("show").select_option("mixed")
    assert count.text_content().startswith("2 groups of 14")


def test_a_hostile_trajectory_runs_no_script(tmp_path, page):
    write_run(tmp_path, words=HOSTILE, output=HOSTILE, name=HOSTILE, stop=HOSTILE)
    add_tokenizer(tmp_path)
    open_file(page, report.write_report([tmp_path]))
    for tab in ("Trajectories", "Config"):
        page.get_by_role("tab", name=tab).click()
    page.get_by_role("tab", name="Trajectories").click()
    page.locator(".line").first.click()
    page.wait_for_selector(".trajectory")
    page.get_by_role("button", name="tokens").click()
    page.get_by_role("button", name="its group of").click()
    page.wait_for_selector(".columns")
    assert page.locator(".columns pre.output").first.text_content() == HOSTILE
    assert page.locator("#main img, #main iframe, #main svg, #main a").count() == 0
    page.evaluate(REQUEST_SCRIPT)  # and one that got into the document would not run: the policy holds
    assert page.evaluate("window.hacked") is None
    assert {url.split(":")[0] for url in page.requests_made} == {"file"} and len(page.requests_made) == 1


def test_ten_thousand_trajectories_do_not_freeze(tmp_path, page):
    write_run(tmp_path, steps=100, problems=25, rewards=(1.0, -1.0, 1.0, -1.0), words="So it is 42. " * 40)
    path = report.write_report([tmp_path])
    started = time.monotonic()
    open_file(page, path)
    opened = time.monotonic() - started
    page.evaluate(  # the longest time that the page answers to nothing
        "() => { window.gap = 0; let last = performance.now(); setInterval(() => { const now = performance.now();"
        " window.gap = Math.max(window.gap, now - last); last = now; }, 10); }"
    )
    page.get_by_role("tab", name="Trajectories").click()
    assert page.locator(".browser > .note").text_content().startswith("10200 trajectories of 10200")
    assert page.locator(".line").count() < 100  # only those in view
    for share in (0.3, 0.6, 1.0):
        page.evaluate(f"() => {{ const l = document.querySelector('.list'); l.scrollTop = l.scrollHeight * {share}; }}")
        page.wait_for_timeout(50)
        page.locator(".line").nth(10).click()
        page.wait_for_selector(".trajectory")
    page.get_by_label("problem", exact=True).fill("problem 24")
    page.get_by_label("show").select_option("mixed")
    assert page.locator(".browser > .note").text_content().startswith("102 groups")
    longest = page.evaluate("window.gap")
    print(f"opened in {opened:.2f} s, longest pause {longest:.0f} ms, file {path.stat().st_size / 2**20:.1f} MiB")
    assert opened < 10 and longest < 1000  # a machine that others load, too
    assert not page.faults


def test_two_runs_compared(tmp_path, page):
    write_run(tmp_path / "a", rewards=(1.0, -1.0))
    write_run(tmp_path / "b", rewards=(1.0, 1.0), steps=3)
    open_file(page, report.write_report([tmp_path / "a", tmp_path / "b"]))
    page.get_by_role("tab", name="Compare").click()
    assert "b is better at 2, worse at 0" in page.locator("#main .note").first.text_content()
    page.locator("tr.pick").first.click()
    page.wait_for_selector(".columns")
    assert page.locator(".columns .trajectory").count() == 4
    assert not page.faults


def test_the_server_s_page_follows_a_run(tmp_path, page):
    write_run(tmp_path / "a", steps=3)
    write_run(tmp_path / "b", steps=2)
    server = make_server(tmp_path, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for_selector("nav select")
        page.locator("nav select").first.select_option("a")
        until(page, "document.querySelector('.summary').textContent.startsWith('a: 2 eval, 3 rl steps; 30')")
        with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "phase": "rl", "reward/mean": 0.9}\n')
        until(page, "document.querySelector('.summary').textContent.includes('4 rl steps')")
        page.get_by_role("tab", name="Trajectories").click()
        page.locator(".line").first.click()
        page.wait_for_selector(".trajectory")
        assert not page.faults
    finally:
        server.shutdown()
        server.server_close()
