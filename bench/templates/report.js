// A heading sorts its column: largest first for numbers, A first for words, the other way round the next time.
// Entries without a figure stay last either way.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const first = numeric ? "descending" : "ascending";
      const second = numeric ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? order : "none");
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [left, right] = [a, b].map((row) => row.cells[column].dataset.sort);
        if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
        return sign * (numeric ? left - right : left.localeCompare(right, "en"));
      });
      body.append(...rows);
    });
  });
}
