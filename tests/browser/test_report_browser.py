"""The page about a run in a real browser: drawn, readable at both widths and in both modes, and deaf to scripts in texts."""

import pytest

import sepcap
from sepcap.studies.ablations.config import AblationSweepConfig
from sepcap.studies.ablations.random_neurons import sweep_ablation
from sepcap.tasks.load import load_task

pytestmark = pytest.mark.browser

MARKUP = "<img src=x onerror=window.__pwned=1></script><script>window.__pwned=2</script>"
NAMES = {"forget": f"code {MARKUP}", "retain": f"prose {MARKUP}"}
WIDTHS = (390, 1280)
LEAST_CONTRAST = 4.5

TEXTS = """() => {
  // colours as the browser reads them: painted onto a pixel
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const over = (colour, alpha, below) => {
    paint.globalAlpha = 1;
    paint.fillStyle = `rgb(${below.join()})`;
    paint.fillRect(0, 0, 1, 1);
    paint.globalAlpha = alpha;
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.unshift(getComputedStyle(e).backgroundColor);
    return chain.reduce((below, colour) => over(colour, 1, below), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
    const box = element.getBoundingClientRect();
    if (!own || !box.width || !box.height || element.closest("script, style, noscript, .modebar")) continue;
    const style = getComputedStyle(element), inFigure = element.namespaceURI.endsWith("svg");
    const below = paper(element);
    const colour = over(inFigure ? style.fill : style.color, inFigure ? Number(style.fillOpacity) * Number(style.opacity) : 1, below);
    const [a, b] = [light(colour), light(below)].sort((x, y) => y - x);
    found.push({ text: own.slice(0, 60), inFigure, contrast: (a + 0.05) / (b + 0.05), size: parseFloat(style.fontSize), below });
  }
  return found;
}"""

PLOTS = """() => [...document.querySelectorAll("div.figure")].map((div) => ({
  id: div.id,
  drawn: div.classList.contains("js-plotly-plot"),
  svg: div.querySelectorAll("svg.main-svg").length,
  marks: [...div.querySelectorAll(".js-line, .point, .js-fill, .hm image")]
    .filter((mark) => !mark.closest(".legend"))
    .filter((mark) => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; }).length,
  fits: div.querySelector("svg.main-svg").getBoundingClientRect().width <= div.getBoundingClientRect().width + 1,
}))"""

CUT = """(width) => [...document.querySelectorAll("div.figure text")].filter((text) => {
  const box = text.getBoundingClientRect(), figure = text.closest("div.figure").getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > width + 0.5 || box.left < figure.left - 1 || box.right > figure.right + 1);
}).map((text) => [text.closest("div.figure").id, text.textContent])"""
"""Texts of figures that stick out of their figure or of the page."""


def texts_of(letters, digits) -> dict[str, list[str]]:
    """Texts of both tasks: every one begins with markup."""
    return {role: [f"<b>{text}" for text in texts] for role, texts in {"forget": letters, "retain": digits}.items()}


@pytest.fixture(scope="module")
def report(trained_folder, letters, digits, tmp_path_factory):
    """The page of a real run whose tasks and prompts hold markup and script."""
    tasks = {role: load_task(texts, name=NAMES[role]) for role, texts in texts_of(letters, digits).items()}
    options = {"fractions": {"mlp": 0.25, "attn_pre_out": 0.25}, "steps": 3, "tokens": 300, "eval_tokens": 900, "batch_size": 4}
    config = sepcap.PruningConfig(model=str(trained_folder), **tasks, **options)
    run = sepcap.prune(None, config, out=tmp_path_factory.mktemp("run"))
    return run.report()


class Opened:
    """A page with what went wrong while it opened and what it asked for."""

    def __init__(self, browser, path, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints, self.requests, self.refused = [], [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.append(request.failure))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length === document.querySelectorAll('.figure').length")

    def resize(self, width: int) -> None:
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_timeout(500)  # plotly waits for the end of resizing before it draws again


@pytest.fixture
def open_page(browser, report):
    opened = []

    def open_page(**options) -> Opened:
        opened.append(Opened(browser, report, **{"viewport": {"width": WIDTHS[1], "height": 900}, **options}))
        return opened[-1]

    yield open_page
    for each in opened:
        each.context.close()


def test_it_opens_from_a_file_without_complaints_or_requests(open_page, report):
    opened = open_page()
    assert opened.complaints == []
    assert opened.requests == [report.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn(open_page, scheme):
    plots = open_page(color_scheme=scheme).page.evaluate(PLOTS)
    assert {"trajectory", "areas", "top1", "loss", "scores-mlp", "scores-attn_pre_out", "thresholds", "pruned"} == {p["id"] for p in plots}
    assert all(plot["drawn"] and plot["svg"] and plot["marks"] for plot in plots), plots


def test_it_is_readable_at_both_widths_and_after_a_change_of_width(open_page):
    opened = open_page(viewport={"width": WIDTHS[0], "height": 900})
    for width in (*WIDTHS, WIDTHS[0]):
        opened.resize(width)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(plot["fits"] for plot in opened.page.evaluate(PLOTS))
        assert opened.page.evaluate(CUT, width) == []
        texts = opened.page.evaluate(TEXTS)
        assert min(t["size"] for t in texts if not t["inFigure"]) >= 14
        assert min(t["size"] for t in texts if t["inFigure"]) >= 7  # exponents and indices are the smallest
    # what is wider than the page scrolls inside its own box
    table = opened.page.locator(".scroll:has(table.numbers)").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto'")
    said = table.evaluate("e => e.previousElementSibling.checkVisibility() && e.previousElementSibling.textContent")
    assert said.startswith("Scrolls to the")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_modes(open_page, scheme):
    texts = open_page(color_scheme=scheme).page.evaluate(TEXTS)
    assert {t["inFigure"] for t in texts} == {True, False}
    paper = sum(texts[0]["below"]) / 3
    assert paper < 60 if scheme == "dark" else paper > 240
    assert [t for t in texts if t["contrast"] < LEAST_CONTRAST] == []


def test_the_mode_can_change_while_the_page_is_open(open_page):
    opened = open_page(color_scheme="light")
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_timeout(500)
    assert [t for t in opened.page.evaluate(TEXTS) if t["contrast"] < LEAST_CONTRAST] == []
    assert all(plot["marks"] for plot in opened.page.evaluate(PLOTS))
    assert opened.complaints == []


def test_script_in_names_and_prompts_is_shown_and_not_run(open_page):
    page = open_page().page
    assert page.evaluate("window.__pwned") is None
    assert page.locator("h1").inner_text() == f"Forget {NAMES['forget']}, retain {NAMES['retain']}"
    assert page.locator("main img, main script, main b, main s").count() == 0
    # plotly shows the ends of a long name letter by letter, as axis title and in the legend
    assert "code <img" in page.locator("#trajectory").text_content()
    page.locator("#top1 .point").first.hover(force=True)
    page.wait_for_selector("#top1 .hoverlayer .hovertext")
    assert "code <img" in page.locator("#top1 .hoverlayer").text_content()
    assert page.evaluate("window.__pwned") is None


def test_prompts_are_parts_of_texts_of_the_tasks_of_the_run(open_page, letters, digits):
    prompts = open_page().page.locator("pre .prompt").all_text_contents()
    assert len(prompts) == 4
    for prompt, texts in zip(prompts[::2], texts_of(letters, digits).values(), strict=True):
        assert prompt.strip()
        assert any(prompt in text for text in texts)


def test_the_policy_stops_what_got_in_all_the_same(open_page):
    opened = open_page()
    opened.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.__late = 1";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<img src='report.html' onerror='window.__late = 2'>");
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.__late") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    assert opened.refused == ["csp"]


# the page about a study



@pytest.fixture(scope="module")
def study_page(trained_folder, letters, tmp_path_factory):
    """The page of a real study, whose task has markup and script in its name."""
    task = load_task(letters, name=NAMES["forget"])
    config = AblationSweepConfig(task=task, steps=2, seeds=(0, 1), kinds=("zero", "mean"), tokens=300, reference_tokens=500)
    return sweep_ablation(sepcap.load_model(trained_folder, device="cpu"), config, out=tmp_path_factory.mktemp("study")).report()


@pytest.fixture(params=["light", "dark"])
def opened_study(browser, study_page, request):
    opened = Opened(browser, study_page, viewport={"width": WIDTHS[0], "height": 900}, color_scheme=request.param, has_touch=True)
    yield opened
    opened.context.close()


def test_a_study_is_readable_on_a_narrow_screen_in_both_modes(opened_study):
    page = opened_study.page
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[0]
    plots = page.evaluate(PLOTS)
    assert [plot["id"] for plot in plots] == ["figure-sweep"]
    assert all(plot["drawn"] and plot["marks"] and plot["fits"] for plot in plots)
    texts = page.evaluate(TEXTS)
    assert [t for t in texts if t["contrast"] < LEAST_CONTRAST] == []
    assert min(t["size"] for t in texts if not t["inFigure"]) >= 14
    assert min(t["size"] for t in texts if t["inFigure"]) >= 11
    # the whole figure, drawn for a column: nothing beside it scrolls
    figure = page.locator("#figure-sweep")
    assert figure.evaluate("e => e.getBoundingClientRect().right") <= WIDTHS[0]
    assert figure.evaluate("e => e.parentElement.scrollWidth <= e.parentElement.clientWidth")
    assert opened_study.complaints == []
    assert len(opened_study.requests) == 1


def test_script_in_the_names_of_a_study_is_shown_and_not_run(opened_study):
    page = opened_study.page
    assert page.evaluate("window.__pwned") is None
    assert f"On code {MARKUP} (" in page.locator("main").inner_text()
    assert page.locator("main img, main script").count() == 0
