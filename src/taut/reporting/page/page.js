"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const find = (selector) => document.querySelector(selector);

  // Text enters the page as text nodes only, whatever a record contains.
  const make = (name, text, ...children) => {
    const element = document.createElement(name);
    if (text !== null && text !== undefined) element.textContent = text;
    element.append(...children);
    return element;
  };

  /* ---- light and dark ---- */
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = preferred.matches ? "dark" : "light";
  const setTheme = (name) => { root.dataset.theme = name; draw(); };
  preferred.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
  find("#theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  /* ---- charts ---- */
  const area = find("#charts");
  const chosen = (id, key) => {
    const select = find(id);
    if (select) return select.value;
    const chart = data.charts.find((one) => one[key] !== null);
    return chart ? chart[key] : null;
  };
  function draw() {
    if (!area) return;
    const model = chosen("#chart-model", "model"), score = chosen("#chart-score", "score");
    area.replaceChildren();
    for (const chart of data.charts) {
      if (chart.model !== model || (chart.score !== null && chart.score !== score)) continue;
      const place = make("div");
      area.append(make("figure", null, make("figcaption", null, make("b", chart.title), chart.caption), place));
      window.vegaEmbed(place, chart.spec, {
        renderer: "svg", actions: false, config: data.themes[root.dataset.theme],
      }).catch((error) => { place.textContent = String(error); });
    }
  }
  for (const id of ["#chart-model", "#chart-score"]) find(id)?.addEventListener("change", draw);
  draw();

  /* ---- leaderboard ---- */
  const board = find("#board"), body = board.tBodies[0];
  const headings = [...board.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column]?.dataset.sort ?? "";
      // Failed trials and missing values stay at the end, whichever way the rest is sorted.
      const rows = [...body.rows].sort((a, b) => {
        const failed = a.classList.contains("failed") - b.classList.contains("failed");
        const missing = (value(a) === "") - (value(b) === "");
        return failed || missing || (down ? value(b) - value(a) : value(a) - value(b));
      });
      body.append(...rows);
    });
  });
  find("#filter")?.addEventListener("change", (event) => {
    for (const row of body.rows) row.hidden = event.target.value !== "" && row.dataset.model !== event.target.value;
  });
  find("#more")?.addEventListener("click", (event) => {
    const all = board.classList.toggle("all");
    event.target.setAttribute("aria-pressed", String(all));
  });

  /* ---- where a number comes from ---- */
  const dialog = find("#dialog"), sheet = find("#dialog-body");
  const show = (...children) => { sheet.replaceChildren(...children); dialog.showModal(); dialog.scrollTop = 0; };
  const facts = (pairs) => make("dl", null, ...pairs.flatMap(([name, text]) => [make("dt", name), make("dd", text)]));

  function strip(samples) {
    const low = Math.min(...samples), high = Math.max(...samples), svg = "http://www.w3.org/2000/svg";
    const picture = document.createElementNS(svg, "svg");
    picture.setAttribute("viewBox", "0 0 600 52");
    picture.setAttribute("preserveAspectRatio", "none");
    samples.forEach((sample, index) => {
      const dot = document.createElementNS(svg, "circle");
      dot.setAttribute("cx", String(6 + (588 * index) / Math.max(1, samples.length - 1)));
      dot.setAttribute("cy", String(46 - (40 * (sample - low)) / (high - low || 1)));
      dot.setAttribute("r", samples.length > 100 ? "1.3" : "3");
      dot.setAttribute("fill", "currentColor");
      dot.setAttribute("opacity", "0.6");
      picture.append(dot);
    });
    return picture;
  }

  function showCell(cell) {
    const parts = [make("h3", cell.heading), make("p", cell.value), facts(cell.facts)];
    parts[1].className = "value";
    for (const source of cell.sources) {
      parts.push(make("h4", `record ${source.record}, seed ${source.seed}`), facts(source.facts));
      if (source.samples.length > 1) {
        const some = source.samples.length < source.count ? `the first ${source.samples.length} of ` : "";
        const range = `from ${Math.min(...source.samples).toPrecision(4)} to ${Math.max(...source.samples).toPrecision(4)}`;
        const note = make("p", `${some}${source.count} raw samples in the order they were taken, ${range}`);
        note.className = "hint";
        parts.push(strip(source.samples), note);
      }
    }
    show(...parts);
  }

  function table(rows) {
    const columns = [...new Set(rows.flatMap(Object.keys))];
    const head = make("thead", null, make("tr", null, ...columns.map((name) => make("th", name))));
    const lines = rows.map((row) => make("tr", null, ...columns.map((name) => make("td", row[name] ?? ""))));
    const wide = make("div", null, make("table", null, head, make("tbody", null, ...lines)));
    wide.className = "wide";
    return wide;
  }

  function showRow(row) {
    const parts = [make("h3", row.heading), make("pre", row.recipe), make("h4", "records"), table(row.records)];
    if (row.plan.length) parts.push(make("h4", "what was replaced"), table(row.plan));
    if (row.untouched.length) parts.push(make("h4", "what was not changed"), facts(row.untouched));
    show(...parts);
  }

  board.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-cell]"), row = event.target.closest("[data-row]");
    if (cell) showCell(data.cells[Number(cell.dataset.cell)]);
    if (row) showRow(data.details[Number(row.dataset.row)]);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
})();
