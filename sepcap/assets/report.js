(() => {
  "use strict";
  const { figures, narrow, dark } = JSON.parse(document.getElementById("data").textContent);
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  // a figure for a whole page has no room here: the same drawn for a column takes its place
  const slim = window.matchMedia("(max-width: 50rem)");
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
      const shown = Object.hasOwn(narrow, id) && slim.matches ? narrow[id] : figure;
      const { data, layout } = isDark ? recoloured(shown, "") : structuredClone(shown);
      document.getElementById(id).style.height = `${Math.round(layout.height ?? 450)}px`;
      Plotly.react(id, data, { ...layout, dragmode }, config);
    }
  }

  // where scrollbars appear only while something is scrolled, nothing else says that there is more
  function hint() {
    for (const box of document.querySelectorAll(".scroll")) {
      const ways = [];
      if (box.scrollWidth > box.clientWidth + 1) ways.push("to the right");
      if (box.scrollHeight > box.clientHeight + 1) ways.push("down");
      let line = box.previousElementSibling;
      if (!line?.classList.contains("hint")) {
        line = document.createElement("p");
        line.className = "hint";
        box.before(line);
      }
      line.textContent = `Scrolls ${ways.join(" and ")}.`;
      line.hidden = ways.length === 0;
    }
  }

  draw(night.matches);
  hint();
  window.addEventListener("resize", hint);
  night.addEventListener("change", () => draw(night.matches));
  slim.addEventListener("change", () => draw(night.matches));
  window.addEventListener("beforeprint", () => draw(false));
  window.addEventListener("afterprint", () => draw(night.matches));
})();
