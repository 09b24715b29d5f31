"use strict";
// Adds to the page; all of its content is there without it. Names of hospitals are only compared
// and written as text, never as HTML.
(() => {
  const root = document.documentElement;
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // --- colour scheme and choice of a hospital ---------------------------------------------------
  const tools = make("div", "", { class: "tools" });
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme:dark)").matches;
  const scheme = make("button", "", { type: "button" });
  const nameScheme = () => { scheme.textContent = isDark() ? "Light colours" : "Dark colours"; };
  // The rules of the dark scheme stand once in the style: the choice moves their condition.
  const dark = [...document.styleSheets[0].cssRules].find(
    (rule) => rule.media && rule.media.mediaText.includes("prefers-color-scheme"));
  const condition = dark ? dark.media.mediaText : "";
  scheme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    if (dark) dark.media.mediaText = root.dataset.theme === "dark" ? "screen" : condition;
    nameScheme();
  });
  matchMedia("(prefers-color-scheme:dark)").addEventListener("change", nameScheme);
  nameScheme();
  tools.append(scheme);

  const marked = all("[data-site]");
  const sites = [...new Set(marked.map((element) => element.dataset.site))];
  if (sites.length > 1) {
    const choice = make("select", "");
    choice.append(make("option", "all hospitals", { value: "-1" }));
    sites.forEach((site, index) => choice.append(make("option", site, { value: String(index) })));
    choice.addEventListener("change", () => {
      const site = sites[Number(choice.value)];
      root.classList.toggle("chosen", site !== undefined);
      for (const element of marked) element.classList.toggle("on", element.dataset.site === site);
    });
    const label = make("label", "Highlight ");
    label.append(choice);
    tools.append(label);
  }
  const head = document.querySelector("main nav") || document.querySelector("main h1");
  if (head) head.after(tools);

  // --- sorting of tables ------------------------------------------------------------------------
  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const stated = cell && cell.dataset.v;
    const text = stated !== undefined ? stated
      : cell ? all("small,sup,svg", cell).reduce(
        (rest, part) => rest.replace(part.textContent, ""), cell.textContent).trim() : "";
    const number = Number(text.replace(/[,†%]/g, "").replace("−", "-").replace("+", ""));
    return text === "" || text.startsWith("–") ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of all("table")) {
    const body = table.tBodies[0];
    const heads = table.tHead ? all("th", table.tHead) : [];
    if (!body || body.rows.length < 2 || table.classList.contains("fixed")) continue;
    heads.forEach((cell, column) => {
      if (!cell.textContent.trim()) return;
      const button = make("button", "", { type: "button" });
      button.append(...[...cell.childNodes].filter((node) => node.className !== "range"));
      cell.prepend(button);
      button.addEventListener("click", () => {
        const up = cell.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [row, valueOf(row, column)]);
        // Cells without a value stay at the end.
        rows.sort(([, a], [, b]) => a === null || b === null
          ? (a === null) - (b === null) : up ? compare(a, b) : compare(b, a));
        body.append(...rows.map(([row]) => row));
      });
    });
  }

  // A table that fits needs no stop of its own for the keyboard.
  const wide = all(".wide");
  const stops = () => {
    for (const box of wide) box.tabIndex = box.scrollWidth > box.clientWidth ? 0 : -1;
  };
  addEventListener("resize", stops);
  stops();

  // --- values of charts -------------------------------------------------------------------------
  const tip = make("div", "", { class: "tip", hidden: "" });
  const said = make("div", "", { class: "hidden", role: "status", "aria-live": "polite" });
  document.body.append(tip, said);
  const hide = () => { tip.hidden = true; for (const ring of all(".ring")) ring.remove(); };
  const textOf = (chart, series, index) => {
    const more = (series.dataset.more || "").split(";")[index];
    const x = `${chart.dataset.x} ${series.dataset.x.split(" ")[index]}`;
    const y = `${chart.dataset.y} ${series.dataset.y.split(" ")[index]}`;
    return [series.dataset.name, x, y, more].filter(Boolean).join(" · ");
  };
  const show = (chart, series, index) => {
    hide();
    const [x, y] = series.dataset.at.split(" ")[index].split(",").map(Number);
    const ring = document.createElementNS(chart.namespaceURI, "circle");
    for (const [name, value] of [["class", "ring"], ["cx", x], ["cy", y], ["r", 5]]) {
      ring.setAttribute(name, value);
    }
    chart.append(ring);
    const at = new DOMPoint(x, y).matrixTransform(chart.getScreenCTM());
    tip.textContent = textOf(chart, series, index);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(at.x + 10, innerWidth - width - 8))}px`;
    tip.style.top = `${at.y > height + 16 ? at.y - height - 10 : at.y + 14}px`;
  };
  for (const chart of all("svg.chart")) {
    const lines = all(".series", chart);
    if (!lines.length) continue;
    const points = lines.map((line) => line.dataset.at.split(" ").map(
      (pair) => pair.split(",").map(Number)));
    chart.addEventListener("pointermove", (event) => {
      const at = new DOMPoint(event.clientX, event.clientY)
        .matrixTransform(chart.getScreenCTM().inverse());
      let best = [Infinity, 0, 0];
      points.forEach((line, number) => line.forEach(([x, y], index) => {
        const far = Math.hypot(x - at.x, y - at.y);
        if (far < best[0]) best = [far, number, index];
      }));
      if (best[0] < 30) show(chart, lines[best[1]], best[2]); else hide();
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.setAttribute("tabindex", "0");
    let line = 0;
    let index = 0;
    const shown = () => {
      index = Math.max(0, Math.min(index, points[line].length - 1));
      show(chart, lines[line], index);
      said.textContent = tip.textContent;
    };
    chart.addEventListener("focus", () => { if (chart.matches(":focus-visible")) shown(); });
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      if (event.key === "Escape") hide();
      if (!(event.key in step)) return;
      event.preventDefault();
      line = (line + step[event.key][0] + lines.length) % lines.length;
      index += step[event.key][1];
      shown();
    });
  }

  // --- print ------------------------------------------------------------------------------------
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])").filter((details) => !details.closest("[data-case]"));
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of closed) details.open = false; });
})();
