"use strict";
// The view of neuron profiles, in a page and in a notebook. All text enters as textContent: nothing of it is markup.
// root: an empty element. ask: a function of the number of a neuron, or null. keys: what listens to the keyboard.
function explore(root, data, ask, keys = root) {
  const make = (name, look, ...inside) => {
    const element = document.createElement(name);
    element.className = look;
    element.append(...inside.filter((x) => x !== null && x !== undefined));
    return element;
  };
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const digits = (x) => (x === null || x === undefined ? "–" : (Number.isInteger(x) ? x.toLocaleString("en") : Number(x.toPrecision(4)).toString()).replace("-", "−"));
  const visible = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵\n").replace(/\t/g, "→\t");
  const word = (i) => data.words[i];
  const SHOWN = 400;

  const search = make("input", "");
  Object.assign(search, { type: "search", placeholder: "Search names, tokens and texts", ariaLabel: "Search" });
  const sort = make("select", "");
  sort.setAttribute("aria-label", "Sort by");
  sort.append(...[["", "as listed"], ...data.columns].map(([key, label]) => Object.assign(make("option", "", label), { value: key })));
  const turn = make("button", "turn", "↓");
  turn.setAttribute("aria-label", "Reverse the order");
  const count = make("p", "soft");
  count.setAttribute("role", "status");
  const list = make("div", "list");
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Neurons");
  list.tabIndex = 0;
  const profile = make("section", "profile");
  profile.setAttribute("aria-live", "polite");
  root.append(make("div", "finder", make("div", "tools", search, sort, turn), count, list, make("p", "soft keys", "Keys: ↓ ↑ or j k next and previous, / search, Esc clear")), profile);

  let order = [], chosen = 0, down = true;
  const costs = new Map();
  const hay = data.units.map(() => null);
  const text = (i) => {
    if (hay[i] === null) {
      const u = data.units[i], ids = new Set([...u.promoted, ...u.suppressed].map((pair) => pair[0]));
      const parts = [u.name];
      for (const task of u.tasks) {
        task.preferred.forEach((p) => ids.add(p[0]));
        for (const context of [...task.top, ...task.samples.flat()]) parts.push(context.w.map(word).join(""));
      }
      hay[i] = [...parts, ...[...ids].map(word)].join("\u0000").toLowerCase();
    }
    return hay[i];
  };

  function arrange() {
    const wanted = search.value.toLowerCase(), key = sort.value, sign = down ? -1 : 1;
    order = data.units.map((_, i) => i).filter((i) => !wanted || text(i).includes(wanted));
    const value = (i) => data.units[i].values[key];
    const known = (i) => value(i) !== null && value(i) !== undefined;
    if (key) order.sort((a, b) => known(b) - known(a) || (known(a) ? sign * (value(a) - value(b)) : 0) || a - b);
    else if (!down) order.reverse();
    count.textContent = `${order.length} of ${data.units.length}` + (order.length > SHOWN ? `, the first ${SHOWN} are listed` : "");
    list.replaceChildren(...order.slice(0, SHOWN).map((i) => {
      const u = data.units[i], first = u.tasks.flatMap((t) => t.preferred.slice(0, 2).map((p) => visible(word(p[0])).trim())).join("  ");
      const row = make("div", "row", make("b", "", u.name), make("span", "soft few", first), make("span", "soft", key ? digits(value(i)) : ""));
      row.setAttribute("role", "option");
      row.id = `unit-${i}`;
      row.addEventListener("click", () => show(i));
      return row;
    }));
    if (order.length) show(order.includes(chosen) ? chosen : order[0]);
    else profile.replaceChildren(make("p", "soft", "No neuron matches the search."));
  }

  function context(u, c) {
    const line = make("p", "context");
    c.w.forEach((id, i) => {
      if (id === null) return;
      const a = c.a[i], token = make("span", i === c.at ? "token here" : "token", visible(word(id)));
      if (a) token.style.backgroundColor = `color-mix(in srgb, var(${a > 0 ? "--up" : "--down"}) ${Math.round(55 * Math.min(1, Math.abs(a) / 99))}%, transparent)`;
      token.title = a === null ? "not counted" : `${digits((a / 99) * u.scale)}`;
      line.append(token);
    });
    const facts = [`${digits(c.act)}`, `document ${c.doc}`, `position ${c.pos}`];
    if (c.src) facts.push(`strongest source “${visible(word(c.src[0])).trim()}” at ${c.src[1]} adds ${digits(c.src[2])}`);
    return make("div", "", line, make("p", "soft", facts.join(" · ")));
  }

  function histogram(u) {
    const W = 400, H = 120, bins = u.tasks[0].histogram.length;
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H + 4}`, role: "img", class: "histogram" });
    picture.setAttribute("aria-label", `Histograms of activations from ${digits(u.edges[0])} to ${digits(u.edges[1])}`);
    const least = Math.min(...u.tasks.flatMap((t) => t.histogram.filter((x) => x > 0)), 1), floor = Math.log10(least) - 0.5;
    u.tasks.forEach((task, t) => {
      const y = (x) => (x > 0 ? H * (Math.log10(x) / floor) : H).toFixed(1);
      const path = task.histogram.map((x, i) => `${i ? "L" : "M"}${((i * W) / bins).toFixed(1)} ${y(x)}H${(((i + 1) * W) / bins).toFixed(1)}`).join("");
      picture.append(svg("path", { d: path, class: t ? "of-retain" : "of-forget" }));
    });
    picture.append(svg("path", { d: `M0 ${H}H${W}`, class: "axis" }));
    const ends = make("p", "soft ends", make("span", "", digits(u.edges[0])), make("span", "", "activation (share of positions, logarithmic)"), make("span", "", digits(u.edges[1])));
    return make("figure", "", picture, ends, make("figcaption", "", ...data.tasks.map((name, t) => make("span", t ? "key retain" : "key forget", name))));
  }

  const tokens = (title, note, rows, value) =>
    rows.length ? make("div", "", make("h3", "", title), make("p", "soft", note), make("p", "chips", ...rows.map((r) => {
      const chip = make("span", "chip", make("span", "token", visible(word(r[0])).replace(/\n/g, "").replace(/ /g, "·")), make("span", "soft", value(r)));
      return chip;
    }))) : null;

  function cost(i) {
    const box = make("div", "cost"), known = costs.get(i);
    const button = make("button", "ablate", known === "asked" ? "Ablating…" : "Ablate and measure");
    button.disabled = known === "asked";
    button.addEventListener("click", () => { costs.set(i, "asked"); ask(i); show(i); });
    box.append(button);
    if (known && known !== "asked") {
      if (known.error) box.append(make("p", "", known.error));
      else box.append(...known.tasks.map((t) => make("p", "", `${t.task}: cross-entropy ${signed(t.loss)} [${signed(t.loss_low)}, ${signed(t.loss_high)}] nats, top-1 ${signed(100 * t.top1)} [${signed(100 * t.top1_low)}, ${signed(100 * t.top1_high)}] points, on ${t.n.toLocaleString("en")} held-out predictions`)));
    }
    return box;
  }
  const signed = (x) => (x > 0 ? "+" : "") + digits(x);

  function show(i) {
    chosen = i;
    const u = data.units[i];
    for (const row of list.children) {
      const mine = row.id === `unit-${i}`;
      row.setAttribute("aria-selected", mine);
      if (mine) {
        list.setAttribute("aria-activedescendant", row.id);
        const top = row.offsetTop - list.offsetTop;
        if (top < list.scrollTop || top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
      }
    }
    const has = ([key]) => u.values[key] !== null && u.values[key] !== undefined;
    const number = (key) => digits(u.values[key]) + (has([`${key}_low`]) ? ` [${digits(u.values[`${key}_low`])}, ${digits(u.values[`${key}_high`])}]` : "");
    const single = data.columns.filter((column) => !column[2] && has(column));
    const values = make("p", "values", ...single.map(([key, label]) => make("span", "", make("span", "soft", `${label} `), number(key))));
    const cells = (row, keys, name) => make("tr", "", Object.assign(make("th", "", row), { scope: "row" }), ...keys.map((key, t) => make("td", name ? ["forget", "retain"][t] : "", name ? key : number(key))));
    const numbers = make("table", "", cells("", data.tasks, true), ...data.columns.filter((column) => column[2] === "forget" && has(column))
      .map(([key, label]) => cells(label.slice(0, -data.tasks[0].length - 2), [key, key.replace(/_forget/, "_retain")])));
    const logits = make("div", "pair",
      tokens("Promotes directly", "change of the logit by an activation of 1, times the scale of the final norm", u.promoted, (r) => signed(r[1])),
      tokens("Suppresses directly", "the same, most negative first", u.suppressed, (r) => signed(r[1])));
    const pair = (inside) => make("div", "pair", ...u.tasks.map((task, t) => make("div", "", make("h3", t ? "retain" : "forget", data.tasks[t]), ...inside(task))));
    profile.replaceChildren(
      make("h2", "", u.name), ...(ask ? [cost(i)] : []), values, histogram(u), numbers, logits,
      ...data.notes.map((note) => make("p", "soft", note)),
      make("h3", "part", "Preferred tokens"), pair((task) => [tokensOf(task)]),
      make("h3", "part", "Strongest contexts"), pair((task) => (task.top.length ? task.top.map((c) => context(u, c)) : [make("p", "soft", "Never active.")])),
      make("h3", "part", "Samples per quantile of the activation"),
      ...data.groups.map((name, g) => make("div", "", make("h4", "", name), pair((task) => (task.samples[g].length ? task.samples[g].map((c) => context(u, c)) : [make("p", "soft", "No position among the random windows.")])))).reverse());
  }
  const tokensOf = (task) => tokens("", "mean |activation| at the token over that at all positions; number of occurrences", task.preferred, (r) => `${digits(r[1])}× (${r[2]})`) || make("p", "soft", "None.");

  function move(step) {
    const at = order.indexOf(chosen), next = order[Math.min(Math.max(at + step, 0), Math.min(order.length, SHOWN) - 1)];
    if (next !== undefined) show(next);
  }
  keys.addEventListener("keydown", (event) => {
    const typing = event.target === search, inSelect = event.target === sort;
    if (event.ctrlKey || event.metaKey || event.altKey || inSelect) return;
    const step = { ArrowDown: 1, ArrowUp: -1, ...(typing ? {} : { j: 1, k: -1 }) }[event.key];
    if (step) move(step);
    else if (event.key === "/" && !typing) search.focus();
    else if (event.key === "Escape" && typing) { search.value = ""; arrange(); list.focus(); }
    else if (event.key === "Enter" && typing) list.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  search.addEventListener("input", arrange);
  sort.addEventListener("change", arrange);
  turn.addEventListener("click", () => { down = !down; turn.textContent = down ? "↓" : "↑"; arrange(); });
  arrange();
  return { answer: (i, found) => { costs.set(i, found); if (chosen === i) show(i); } };
}
