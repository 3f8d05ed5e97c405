"use strict";
(() => {
  const root = document.documentElement;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  // -- theme ---------------------------------------------------------------------------------------------------------
  const toggle = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  try { root.dataset.theme = localStorage.getItem("repair-report-theme") || ""; } catch { /* a file may have no storage */ }
  if (!root.dataset.theme) delete root.dataset.theme;
  label();
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("repair-report-theme", root.dataset.theme); } catch { /* likewise */ }
    label();
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { label(); draw(); });

  // -- figures -------------------------------------------------------------------------------------------------------
  const figures = read("data-figures");
  const style = getComputedStyle(root);
  const coloured = (value) => {
    if (typeof value === "string") return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v)]));
    return value;
  };
  const draw = () => {
    if (!window.Plotly) return Promise.resolve();
    return Promise.all(Object.entries(figures).map(([name, figure]) => {
      const { data, layout } = coloured(figure);
      const options = { responsive: true, displaylogo: false, displayModeBar: false };
      const place = document.getElementById("plot-" + name);
      place.style.height = layout.height + "px"; // where the width changes, Plotly takes the height of what it stands in
      return window.Plotly.react(place, data, layout, options);
    }));
  };
  const unpacked = async () => {
    const packed = document.getElementById("data-plotly").textContent.trim();
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const pictures = async () => {
    if (!("DecompressionStream" in window)) {
      document.querySelectorAll(".plot").forEach((plot) => {
        plot.textContent = "This browser is too old to draw the picture; its numbers are below.";
      });
      return;
    }
    await unpacked();
    await draw();
    root.dataset.drawn = "yes";
  };

  // -- tables --------------------------------------------------------------------------------------------------------
  const compare = (a, b) => {
    const numbers = [Number(a), Number(b)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return numbers.every(Number.isFinite) ? numbers[0] - numbers[1] : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  const turned = (heading) => {
    const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    heading.parentNode.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
    return direction === "ascending" ? 1 : -1;
  };
  const clickable = (heading, sort) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => sort(turned(heading)));
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const key = (row, i) => { const cell = row.cells[i]; return cell.dataset.v ?? cell.textContent.trim(); };
    table.querySelectorAll("thead tr:last-child th").forEach((heading, i) => clickable(heading, (direction) => {
      const rows = [...body.rows].sort((a, b) => direction * compare(key(a, i), key(b, i)));
      body.append(...rows);
    }));
  });

  const all = document.getElementById("all-edits");
  if (all) {
    const { columns, rows } = read("data-edits");
    const [search, only, before, after, where] = ["search", "only", "before", "after", "where"].map((id) => document.getElementById(id));
    const size = 25;
    let page = 0, order = null;
    const shown = () => {
      const words = search.value.toLowerCase(), verdict = columns.findIndex((column) => column.name === "now");
      const found = rows.filter((row) => (!only.value || row[verdict] === only.value)
        && (!words || row.some((cell) => String(cell ?? "").toLowerCase().includes(words))));
      return order ? [...found].sort((a, b) => order.direction * compare(a[order.column] ?? "", b[order.column] ?? "")) : found;
    };
    const cell = (value, column) => {
      const td = document.createElement("td");
      td.className = column.kind;
      td.textContent = value ?? "-";
      if (column.name === "now") td.classList.add({ right: "good", wrong: "bad" }[value] || "soft");
      return td;
    };
    const show = () => {
      const found = shown(), pages = Math.max(1, Math.ceil(found.length / size));
      page = Math.min(page, pages - 1);
      all.tBodies[0].replaceChildren(...found.slice(page * size, (page + 1) * size).map((row) => {
        const tr = document.createElement("tr");
        tr.append(...row.map((value, i) => cell(value, columns[i])));
        return tr;
      }));
      where.textContent = found.length ? `${page * size + 1} to ${Math.min((page + 1) * size, found.length)} of ${found.length}` : "nothing found";
      before.disabled = page === 0;
      after.disabled = page >= pages - 1;
    };
    all.querySelectorAll("thead th").forEach((heading, column) => clickable(heading, (direction) => {
      order = { column, direction }; page = 0; show();
    }));
    search.addEventListener("input", () => { page = 0; show(); });
    only.addEventListener("change", () => { page = 0; show(); });
    before.addEventListener("click", () => { page -= 1; show(); });
    after.addEventListener("click", () => { page += 1; show(); });
    show();
  }

  pictures();
})();
