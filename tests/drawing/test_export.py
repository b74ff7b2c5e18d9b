"""Static files: what is a PDF, an SVG and a PNG, and what paper cannot do."""

import re

import pytest
import torch
from planted_statistics import with_importance

from sepcap import plots
from sepcap.drawing.style import PX_PER_INCH, SLIDER_PX


@pytest.fixture
def fig():
    pair = (torch.exp(torch.randn(3, 60, generator=torch.Generator().manual_seed(s))) for s in (0, 1))
    return plots.importance_scatter(*(with_importance(t, {"mlp": v}) for t, v in zip(("code", "prose"), pair, strict=True)))


def test_a_page_keeps_the_slider(fig, tmp_path):
    page = plots.save(fig, tmp_path / "s.html").read_text(encoding="utf-8")
    assert '"sliders":[{"active":0' in page


@pytest.mark.browser
def test_paper_gets_the_figure_as_it_opens(fig, tmp_path):
    before = fig.to_json()
    for suffix, start in ((".pdf", b"%PDF"), (".svg", b"<svg"), (".png", b"\x89PNG")):
        assert plots.save(fig, tmp_path / f"s{suffix}").read_bytes().startswith(start)
    svg = (tmp_path / "s.svg").read_text(encoding="utf-8")
    assert "Layer: all" not in svg
    assert 'class="slider' not in svg
    height = float(re.search(r'height="([\d.]+)mm"', svg)[1])
    assert height == pytest.approx((fig.layout.height - SLIDER_PX) / PX_PER_INCH * 25.4, abs=0.1)
    assert "code (forget)" in re.sub("<[^>]+>", "", svg)
    assert fig.to_json() == before


@pytest.mark.browser
def test_the_slider_shows_single_layers(fig, tmp_path):
    """What a browser makes of the packed numbers of a step."""
    import asyncio
    import json

    import choreographer

    page = plots.save(fig, tmp_path / "s.html")
    script = """
        (async () => {
            const gd = document.querySelector('.plotly-graph-div'), sums = [];
            for (const step of gd.layout.sliders[0].steps) {
                await Plotly.restyle(gd, step.args[0], step.args[1]);
                sums.push([step.label, gd._fullData[0].z.map(r => r.reduce((a, b) => a + b, 0)).reduce((a, b) => a + b, 0)]);
            }
            return JSON.stringify(sums);
        })()"""

    async def run():
        async with choreographer.Browser(headless=True) as browser:
            tab = await browser.create_tab(page.as_uri())
            session = await tab.create_session()

            async def value(expression):
                options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
                said = await session.send_command("Runtime.evaluate", options)
                return said.get("result", {}).get("result", {}).get("value")

            for _ in range(300):
                if await value("!!document.querySelector('.plotly-graph-div')?._fullData") is True:
                    break
                await asyncio.sleep(0.1)
            return await value(script)

    assert json.loads(asyncio.run(run())) == [["all", 180], ["0", 60], ["1", 60], ["2", 60]]
