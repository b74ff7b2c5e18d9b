"""The page of neuron profiles in a real browser: searched, sorted, driven by the keyboard, readable, and deaf to scripts in texts."""

import pytest
from hostile_profiles import MARKUP, hostile_profiles
from test_report_browser import LEAST_CONTRAST, TEXTS, WIDTHS
from tiny import fresh

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(trained_folder, letters, digits, tmp_path_factory):
    return hostile_profiles(fresh(trained_folder), letters, digits, n=12).report(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(params=WIDTHS)
def opened(browser, path, request):
    """The page with what went wrong and what it asked for."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    page = context.new_page()
    page.complaints, page.requests, page.width = [], [], request.param
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda sent: page.requests.append(sent.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".row")
    yield page
    context.close()


def chosen(page):
    rows = page.locator(".row[aria-selected=true]")
    assert rows.count() == 1
    assert page.locator("h2").inner_text() == rows.locator("b").inner_text()
    return page.locator("h2").inner_text()


def test_it_opens_without_complaints_or_requests_and_fits(opened, path):
    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.width
    assert opened.locator(".context").count() > 8
    assert opened.locator(".histogram path").count() == 3
    assert chosen(opened) == "mlp 0.0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_large_and_stands_out_in_both_modes(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    texts = [text for text in opened.evaluate(TEXTS) if not text["inFigure"]]
    assert len(texts) > 50
    assert min(text["size"] for text in texts) >= 14
    assert [text for text in texts if text["contrast"] < LEAST_CONTRAST] == []


def test_markup_in_names_and_tokens_is_text(opened):
    assert opened.evaluate("window.__pwned") is None
    assert f"code {MARKUP}" in opened.locator("main").inner_text()
    assert opened.locator("main img, main script").count() == 0
    for _ in range(12):
        opened.keyboard.press("j")
    assert MARKUP in opened.evaluate("document.getElementById('explorer').textContent")
    assert opened.locator("main img, main script").count() == 0
    assert opened.evaluate("window.__pwned") is None
    assert opened.complaints == []


def test_the_keyboard_moves_searches_and_clears(opened):
    opened.keyboard.press("j")
    opened.keyboard.press("ArrowDown")
    assert chosen(opened) == "mlp 0.2"
    opened.keyboard.press("k")
    assert chosen(opened) == "mlp 0.1"
    opened.keyboard.press("/")
    opened.keyboard.type("mlp 0.11")
    assert chosen(opened) == "mlp 0.11"
    assert opened.locator(".row").count() == 1
    assert opened.locator("[role=status]").inner_text() == "1 of 12"
    opened.keyboard.press("Escape")
    assert opened.locator(".row").count() == 12
    assert chosen(opened) == "mlp 0.11"
    assert opened.evaluate("document.activeElement.getAttribute('role')") == "listbox"
    opened.keyboard.press("/")
    opened.keyboard.type("no such neuron")
    assert opened.locator(".row").count() == 0
    assert "No neuron" in opened.locator(".profile").inner_text()


def test_the_list_is_sorted_by_any_value(opened):
    for key in ("abs_forget", "strongest_retain"):
        opened.locator("select").select_option(key)
        shown = [float(x.replace(",", "").replace("−", "-")) for x in opened.locator(".row span:last-child").all_inner_texts()]
        assert shown == sorted(shown, reverse=True)
        opened.locator(".turn").click()
        back = [float(x.replace(",", "").replace("−", "-")) for x in opened.locator(".row span:last-child").all_inner_texts()]
        assert back == sorted(back)
        opened.locator(".turn").click()


def test_a_click_chooses_a_neuron(opened):
    opened.locator(".row").nth(3).click()
    assert chosen(opened) == "mlp 0.3"
    assert opened.locator(".token.here").count() == opened.locator(".context").count()


def test_the_view_of_a_notebook_asks_and_shows_the_answer(browser, path):
    """The same code with a function to ask: the button of a neuron, and the cost that comes back."""
    from sepcap.studies.neuron_profiles.explorer import asset

    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900})
    page = context.new_page()
    page.set_content("<div class='sepcap'><div class='explorer' id='root'></div></div>")
    data = path.read_text().split('id="data">')[1].split("</script>")[0]
    start = f"explore(document.getElementById('root'), {data}, (i) => window.asked.push(i))"
    page.evaluate(f"{asset('js')}; window.asked = []; window.view = {start};")
    page.locator(".ablate").click()
    assert page.evaluate("window.asked") == [0]
    assert page.locator(".ablate").is_disabled()
    part = {"n": 600, "loss": 0.01, "loss_low": 0.0, "loss_high": 0.02, "top1": -0.01, "top1_low": -0.02, "top1_high": 0}
    page.evaluate("(found) => window.view.answer(0, found)", {"unit": 0, "tasks": [{"task": MARKUP, **part}]})
    said = page.locator(".cost").inner_text()
    assert MARKUP in said
    assert "cross-entropy +0.01 [0, +0.02] nats, top-1 −1 [−2, 0] points, on 600 held-out predictions" in said
    page.evaluate("(found) => window.view.answer(0, found)", {"unit": 0, "error": "ValueError: <b>x"})
    assert "ValueError: <b>x" in page.locator(".cost").inner_text()
    assert page.locator(".cost b, .cost img").count() == 0
    context.close()
