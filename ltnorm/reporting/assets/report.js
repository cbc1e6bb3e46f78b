// What the page adds to its tables: sorting, filtering, a choice of columns, and the plots.
// Text is only ever set as text; nothing here reads HTML from data.
"use strict";
(() => {
  const FEW = 8; // rows that are seen at once and need no filter
  const status = document.getElementById("status");

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // Sorting. Numbers are in data-sort, with all their digits; an empty one is missing.

  const words = new Intl.Collator("en", { numeric: true });

  function compare(a, b, sign) {
    const [x, y] = [a.dataset.sort, b.dataset.sort];
    if (x === undefined || y === undefined) return sign * words.compare(a.textContent, b.textContent);
    if (x === "" || y === "") return (x === "") - (y === ""); // missing ones last, both ways
    return sign * (Number(x) - Number(y));
  }

  function sort(table, heading) {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const place = heading.cellIndex;
    for (const body of table.tBodies) { // rows of the literature have a body of their own
      const rows = [...body.rows]; // Array.sort is stable
      rows.sort((a, b) => compare(a.cells[place], b.cells[place], ascending ? 1 : -1));
      body.append(...rows);
    }
    status.textContent = `sorted by ${heading.textContent}, ${ascending ? "ascending" : "descending"}`;
  }

  function sortable(table) {
    for (const heading of table.tHead.rows[0].cells) {
      const button = element("button", { type: "button", onclick: () => sort(table, heading) });
      button.append(...heading.childNodes);
      heading.append(button);
    }
  }

  // Filtering: a row stays if it has all words that were typed.

  function filter(table, text, shown) {
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
    for (const row of rows) {
      const content = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !wanted.every((word) => content.includes(word));
    }
    const count = rows.filter((row) => !row.hidden).length;
    shown.textContent = wanted.length ? `${count} of ${rows.length} rows` : "";
    status.textContent = shown.textContent;
  }

  function filterable(table) {
    const shown = element("span", { className: "shown" });
    const box = element("input", { type: "search", autocomplete: "off" });
    box.addEventListener("input", () => filter(table, box.value, shown));
    return [element("label", {}, "Filter rows: ", box), shown];
  }

  // Columns: each can be hidden but the first.

  function choosable(table) {
    const boxes = [...table.tHead.rows[0].cells].slice(1).map((heading) => {
      const box = element("input", { type: "checkbox", checked: true });
      const place = heading.cellIndex;
      box.addEventListener("change", () => {
        for (const row of table.rows) row.cells[place].hidden = !box.checked;
      });
      return element("label", {}, box, ` ${heading.textContent}`);
    });
    const choice = element("details", { className: "columns" });
    const group = element("div", {}, ...boxes);
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Columns that are shown");
    choice.append(element("summary", {}, "Columns"), group);
    return choice;
  }

  for (const table of document.querySelectorAll(".scroll > table")) {
    const tools = element("div", { className: "tools" });
    const main = "columns" in table.dataset;
    if (main || table.tBodies[0].rows.length > FEW) tools.append(...filterable(table));
    if (main) tools.append(choosable(table));
    if (tools.hasChildNodes()) table.parentNode.before(tools);
    sortable(table);
  }

  // Plots: those in sight first, then one after the other.

  const { charts, data, specs } = JSON.parse(document.getElementById("plots").textContent);
  const config = {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      labelColor: "var(--ink)", titleColor: "var(--muted)", titleFontWeight: "normal",
      domainColor: "var(--muted)", tickColor: "var(--muted)", gridColor: "var(--line)",
    },
  };
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, config,
    ast: true, // expressions are interpreted, not compiled: the page allows no eval
    tooltip: { disableDefaultStyle: true, theme: "page" },
  };

  function values({ labels, columns, rows }) {
    return rows.map((row) => Object.fromEntries(
      columns.map((name, i) => [name, name === "row" ? labels[row[i]] : row[i]]),
    ));
  }

  async function draw({ id, data: place, spec }) {
    const frame = document.getElementById(id);
    const description = frame.getAttribute("aria-label");
    const whole = { ...specs[spec], data: { values: values(data[place]) }, description };
    try {
      await window.vegaEmbed(frame, whole, options);
    } catch (error) {
      frame.textContent = `This plot could not be drawn. ${description}`;
      console.error(error);
    }
  }

  function inSight({ id }) {
    const { top, bottom } = document.getElementById(id).getBoundingClientRect();
    return bottom > 0 && top < window.innerHeight;
  }

  async function drawAll() {
    const left = [...charts];
    while (left.length) {
      const next = Math.max(0, left.findIndex(inSight));
      await draw(left.splice(next, 1)[0]);
      await new Promise((resolve) => setTimeout(resolve)); // the page stays usable meanwhile
    }
    document.documentElement.dataset.plots = "drawn";
  }

  drawAll();
})();
