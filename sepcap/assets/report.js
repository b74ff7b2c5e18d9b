(() => {
  "use strict";
  const { figures, dark } = JSON.parse(document.getElementById("data").textContent);
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  // zooming by touch would keep the page from being scrolled
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
  // where nothing hovers, the bar of buttons would lie on the figures for good
  const displayModeBar = window.matchMedia("(hover: none)").matches ? false : "hover";
  const config = { displaylogo: false, displayModeBar, responsive: true, toImageButtonOptions: { format: "svg" } };

  // only what a colour is wanted for is exchanged: a task may be called "white"
  function recoloured(value, key) {
    if (typeof value === "string") return /color/i.test(key) && Object.hasOwn(dark, value) ? dark[value] : value;
    if (Array.isArray(value)) return value.map((item) => recoloured(item, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recoloured(item, name)]));
  }

  function draw(isDark) {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = isDark ? recoloured(figure, "") : structuredClone(figure);
      Plotly.react(id, data, { ...layout, dragmode }, config);
    }
  }

  draw(night.matches);
  night.addEventListener("change", () => draw(night.matches));
  window.addEventListener("beforeprint", () => draw(false));
  window.addEventListener("afterprint", () => draw(night.matches));
})();
