"use strict";
// Where a row of a table is stacked, its cells have their headings' names. Tables sort by a click on a heading, and a search field hides the rows of its section's table that lack its words.
(() => {
  const number = (text) => /^-?[\d,.]+( ±.*)?$/.test(text) ? parseFloat(text.replace(/,/g, "")) : NaN;
  const compare = (a, b) => {
    if (a === "-" || b === "-") return (a === "-") - (b === "-");
    const difference = number(a) - number(b);
    return Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference;
  };
  document.querySelectorAll("table").forEach((table) => {
    const headings = [...table.querySelectorAll("th")], body = table.tBodies[0];
    const names = headings.map((heading) => heading.textContent);
    if (table.matches(".stack")) for (const row of body.rows) [...row.cells].forEach((cell, i) => { cell.dataset.name = names[i]; });
    headings.forEach((heading, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const rising = heading.getAttribute("aria-sort") !== "ascending";
        headings.forEach((one) => one.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const text = (row) => row.cells[i].textContent;
        body.append(...[...body.rows].sort((a, b) => (rising ? 1 : -1) * compare(text(a), text(b))));
      });
    });
  });
  document.querySelectorAll("input[type=search]").forEach((search) => search.addEventListener("input", () => {
    const words = search.value.toLowerCase();
    let next = search.nextElementSibling;
    while (!next.querySelector("table")) next = next.nextElementSibling;
    for (const row of next.querySelector("table").tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(words);
  }));
})();
