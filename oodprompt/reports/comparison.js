
// A click on a head of a column sorts the rows: the better end first, then the other way round.
const table = document.querySelector("table.runs");
for (const button of table.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), column = head.cellIndex, body = table.tBodies[0];
    const falls = head.ariaSort ? head.ariaSort === "ascending" : head.dataset.first === "descending";
    const value = (row) => row.cells[column].dataset.value;
    const missing = (row) => value(row) === "";
    const rows = [...body.rows].sort((a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = head.dataset.kind === "text" ? value(a).localeCompare(value(b)) : value(a) - value(b);
      return falls ? -order : order;
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.ariaSort = falls ? "descending" : "ascending";
    body.append(...rows);
  });
}
