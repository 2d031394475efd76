/* Grid: only the rows in sight are in the document. */

const GAP = 14, CELL = 132, OVERSCAN = 2;
const cells = new Map();
let active = 0;  // place in `items` of the picture that keys act on
let columns = 1, cellWidth = CELL, rowHeight = CELL;

function clearCells() {
  $("cells").replaceChildren();
  cells.clear();
}

/** Room for the class, the record and, where pictures differ in that, how they were made. */
function captionHeight() {
  const facets = usedFacets();
  const made = facets.some((name) => SETTINGS.includes(name) || (FOLDERS_TELL && name === "folder"));
  return made ? 59 : 42;
}

function layout() {
  const width = $("cells").clientWidth;
  const least = partner ? 2 * CELL : CELL;
  const before = [columns, cellWidth, rowHeight].join();
  columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
  cellWidth = (width - GAP * (columns - 1)) / columns;
  rowHeight = Math.round(partner ? (cellWidth - 2) / 2 : cellWidth) + captionHeight() + GAP;
  if (before !== [columns, cellWidth, rowHeight].join()) clearCells();
  $("cells").style.height = `${Math.max(0, Math.ceil(items.length / columns) * rowHeight - GAP)}px`;
  draw();
}

function draw() {
  const grid = $("grid");
  const first = Math.max(0, Math.floor(grid.scrollTop / rowHeight) - OVERSCAN) * columns;
  const rows = Math.ceil(grid.clientHeight / rowHeight) + 2 * OVERSCAN;
  const end = Math.min(items.length, first + rows * columns);
  for (const [at, cell] of cells) {
    if (at < first || at >= end) { cell.remove(); cells.delete(at); }
  }
  for (let at = first; at < end; at++) {
    if (!cells.has(at)) {
      const cell = makeCell(at);
      cells.set(at, cell);
      $("cells").append(cell);
    }
  }
  markActive();
}

function badge(i) {
  const className = isForeign(i) ? "badge foreign" : "badge";
  return markOf(i) ? [element("span", { className }, markOf(i))] : [];
}

function thumbnail(i) {
  const image = element("img", { loading: "lazy", decoding: "async", alt: "" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 100));
  image.src = thumbnailUrl(i);
  return element("span", {}, image, ...badge(i));
}

function heading(i, other) {
  const classes = [i, other].filter((each) => each !== null).map((each) => value("class", each));
  return [...new Set(classes)].join(" and ");
}

function makeCell(at) {
  const i = items[at];
  const other = partner && partner.get(i);
  const frames = element("div", { className: "frames" }, thumbnail(i));
  const { record, made } = where(i, partner ? usedFacets() : FACETS);
  // Where there is little room, only what tells pictures apart.
  const telling = record.filter(([name]) => name === "split" || VARYING.includes(name));
  const short = telling.map(([name, text]) => name === "round" ? `r${value("round", i)}` : text);
  const lines = [[heading(i, other)], short, words(made)].filter((line) => line.length);
  const cell = element("div", { className: "cell", id: `cell-${at}`, role: "option" }, frames,
    ...lines.map((line) => element("p", {}, line.join(", "))));
  if (partner) frames.append(thumbnail(other));
  const marks = [i, other].filter((each) => each !== null).map(markOf).filter(Boolean);
  const both = partner ? [`${saidOf(compared.by, i)} and ${saidOf(compared.by, other)}`] : [];
  cell.title = [heading(i, other), ...words(record), ...words(made), ...both, ...new Set(marks)]
    .join("\n");
  cell.setAttribute("aria-setsize", items.length);
  cell.setAttribute("aria-posinset", at + 1);
  cell.style.left = `${(at % columns) * (cellWidth + GAP)}px`;
  cell.style.top = `${Math.floor(at / columns) * rowHeight}px`;
  cell.style.width = `${cellWidth}px`;
  cell.dataset.at = at;
  return cell;
}

function markActive() {
  for (const [at, cell] of cells) {
    cell.classList.toggle("active", at === active);
    cell.setAttribute("aria-selected", at === active);
  }
  if (cells.has(active)) $("grid").setAttribute("aria-activedescendant", `cell-${active}`);
  else $("grid").removeAttribute("aria-activedescendant");
}

function activate(at) {
  active = Math.max(0, Math.min(items.length - 1, at));
  const grid = $("grid"), top = Math.floor(active / columns) * rowHeight;
  const inset = parseFloat(getComputedStyle(grid).paddingTop);
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + rowHeight + inset > grid.scrollTop + grid.clientHeight) {
    grid.scrollTop = top + rowHeight + inset - grid.clientHeight;
  }
  draw();
}

function gridKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(1, Math.floor($("grid").clientHeight / rowHeight)) * columns;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
    PageUp: -page, PageDown: page, Home: -items.length, End: items.length };
  if (event.key in steps) activate(active + steps[event.key]);
  else if ((event.key === "Enter" || event.key === " ") && items.length) openStep(active);
  else return;
  $("grid").classList.add("keyed");
  event.preventDefault();
}
