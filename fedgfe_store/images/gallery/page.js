"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FACETS = ["node", "round", "split", "class"];
const TITLES = { node: "Node", round: "Round", split: "Split", class: "Class" };
const GAP = 14, CAPTION = 42, CELL = 132, OVERSCAN = 2, SHOWN_VALUES = 300;
const total = data.file.length;

const chosen = Object.fromEntries(FACETS.map((name) => [name, new Set()]));
const haystacks = new Array(total);
let matches = new Uint8Array(total).fill(1);
let items = [];      // numbers of the pictures shown; of pairs, the left one
let partner = null;  // right picture of each left one while rounds are compared
let rounds = [0, 0];
let active = 0;

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const value = (name, i) => String(data.values[name][data[name][i]]);
const number = (n) => n.toLocaleString("en");
const plural = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

function fileName(i) {
  try { return decodeURIComponent(data.file[i]); } catch { return data.file[i]; }
}
const pictureUrl = (i) => data.pictures + data.file[i];
const thumbnailUrl = (i) => `${data.thumbnails}${data.file[i].replace(/\.png$/, "")}.webp`;

const nodeName = (i) => { const n = value("node", i); return /^\d+$/.test(n) ? `node ${n}` : n; };
function sampleName(i) {
  const image = Number(data.image[i]) ? `, image ${data.image[i]}` : "";
  return `${nodeName(i)}, ${value("split", i)} ${data.index[i]}${image}`;
}
const markOf = (i) => (data.mark && data.mark[i]) || "";
const roundName = (i) => `round ${value("round", i)}`;

/* Filters */

function haystack(i) {
  if (haystacks[i] === undefined) {
    const shared = data.values.shared[data.shared[i]];
    const model = shared.settings ? shared.settings.model : "";
    haystacks[i] = [value("class", i), nodeName(i), roundName(i), value("split", i), data.index[i],
      fileName(i), data.own.seed ? data.own.seed[i] : "", model, shared.fingerprint, markOf(i)]
      .join("\n").toLowerCase();
  }
  return haystacks[i];
}

function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (let i = 0; i < total; i++) {
    matches[i] = words.every((word) => haystack(i).includes(word)) ? 1 : 0;
  }
}

function pair() {
  const name = (i) => [data.node[i], data.split[i], data.class[i], data.sample[i], data.image[i]].join();
  const right = new Map();
  for (let i = 0; i < total; i++) if (data.round[i] === rounds[1]) right.set(name(i), i);
  partner = new Map();
  for (let i = 0; i < total; i++) {
    const other = data.round[i] === rounds[0] ? right.get(name(i)) : undefined;
    if (other !== undefined) partner.set(i, other);
  }
}

function refresh() {
  const facets = partner ? FACETS.filter((name) => name !== "round") : FACETS;
  const counts = Object.fromEntries(FACETS.map((n) => [n, new Uint32Array(data.values[n].length)]));
  items = [];
  for (let i = 0; i < total; i++) {
    if (partner && !partner.has(i)) continue;
    if (!matches[i] && !(partner && matches[partner.get(i)])) continue;
    let missed = 0, by = "";
    for (const name of facets) {
      if (chosen[name].size && !chosen[name].has(data[name][i])) { missed++; by = name; }
    }
    if (missed === 0) {
      items.push(i);
      for (const name of FACETS) counts[name][data[name][i]]++;
    } else if (missed === 1) counts[by][data[by][i]]++;
  }
  active = 0;
  showCounts(counts);
  $("grid").scrollTop = 0;
  clearCells();
  layout();
}

function showCounts(counts) {
  for (const button of document.querySelectorAll("#filters li button")) {
    const { facet, place } = button.dataset;
    const found = counts[facet][place];
    button.lastChild.textContent = number(found);
    button.classList.toggle("none", found === 0);
    button.setAttribute("aria-pressed", chosen[facet].has(Number(place)));
  }
  document.querySelector('#filters [data-section="round"]').hidden = partner !== null;
  const noun = partner ? "pair" : "picture";
  const all = partner ? partner.size : total;
  $("status").textContent = items.length === all ? plural(all, noun)
    : `${number(items.length)} of ${plural(all, noun)}`;
  const filtered = $("search").value.trim() !== "" || FACETS.some((name) => chosen[name].size);
  $("nothing").hidden = items.length > 0;
  $("nothing").firstChild.textContent = partner && !filtered
    ? "No sample was drawn at both rounds." : "No picture meets these filters.";
  for (const button of document.querySelectorAll(".clear")) button.hidden = !filtered;
}

function clearFilters() {
  for (const name of FACETS) chosen[name].clear();
  $("search").value = "";
  search();
  refresh();
  $("grid").focus();
}

function buildFilters() {
  const side = $("filters");
  for (const facet of FACETS) {
    const list = element("ul", { className: facet === "class" ? "rows" : "" });
    const values = data.values[facet];
    values.slice(0, SHOWN_VALUES).forEach((text, place) => {
      const button = element("button", { type: "button", title: String(text), "aria-pressed": "false" },
        element("b", {}, String(text)), element("i"));
      button.dataset.facet = facet;
      button.dataset.place = place;
      list.append(element("li", {}, button));
    });
    const section = element("section", { "aria-label": TITLES[facet], "data-section": facet },
      element("h2", {}, TITLES[facet]), list);
    if (values.length > SHOWN_VALUES) {
      section.append(element("p", { className: "more" },
        `and ${number(values.length - SHOWN_VALUES)} more; the search finds them`));
    }
    side.append(section);
  }
  const keys = element("dl", { className: "keys", "aria-label": "Keys" });
  for (const [key, use] of [["/", "search"], ["← ↑ ↓ →", "move"], ["Enter", "open"],
    ["C", "compare rounds"], ["Esc", "close, clear the search"]]) {
    keys.append(element("dt", {}, key), element("dd", {}, use));
  }
  side.append(keys);
}

/* Grid: only the rows in sight are in the document. */

const cells = new Map();
let columns = 1, cellWidth = CELL, rowHeight = CELL;

function clearCells() {
  $("cells").replaceChildren();
  cells.clear();
}

function layout() {
  const width = $("cells").clientWidth;
  const least = partner ? 2 * CELL : CELL;
  const before = [columns, cellWidth, rowHeight].join();
  columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
  cellWidth = (width - GAP * (columns - 1)) / columns;
  rowHeight = Math.round(partner ? (cellWidth - 2) / 2 : cellWidth) + CAPTION + GAP;
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
  return markOf(i) ? [element("span", { className: "badge" }, markOf(i))] : [];
}

function thumbnail(i) {
  const image = element("img", { loading: "lazy", decoding: "async", alt: "" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 100));
  image.src = thumbnailUrl(i);
  return element("span", {}, image, ...badge(i));
}

function makeCell(at) {
  const i = items[at];
  const other = partner && partner.get(i);
  const frames = element("div", { className: "frames" }, thumbnail(i));
  const name = element("p", {}, value("class", i));
  const where = partner ? sampleName(i) : `${sampleName(i)}, r${value("round", i)}`;
  const cell = element("div", { className: "cell", id: `cell-${at}`, role: "option" }, frames, name,
    element("p", {}, where));
  if (partner) frames.append(thumbnail(other));
  const shown = partner ? `rounds ${value("round", i)} and ${value("round", other)}` : roundName(i);
  const marks = [i, other].filter((each) => each !== null).map(markOf).filter(Boolean);
  const told = [shown, ...new Set(marks)];
  cell.setAttribute("aria-label", `${value("class", i)}, ${sampleName(i)}, ${told.join(", ")}`);
  cell.setAttribute("aria-setsize", items.length);
  cell.setAttribute("aria-posinset", at + 1);
  cell.title = `${value("class", i)}\n${sampleName(i)}\n${told.join("\n")}`;
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
  else if ((event.key === "Enter" || event.key === " ") && items.length) open(active);
  else return;
  $("grid").classList.add("keyed");
  event.preventDefault();
}

/* Viewer */

const GROUPS = ["Record", "Picture", "Settings", "Embeddings", "Made with"];
const EMBEDDINGS = new Set(["store", "experiment", "store_id", "commit"]);

function* flat(name, content) {
  if (content === null || content === undefined || content === "") return;
  if (typeof content === "object") {
    for (const [key, each] of Object.entries(content)) yield* flat(`${name} ${key}`.trim(), each);
  } else yield [name, String(content)];
}

const SHOWN_AS = {
  created: (text) => text.replace("T", " ").replace("+00:00", " UTC"),
  bytes: (text) => number(Number(text)),
};

function facts(i) {
  const found = Object.fromEntries(GROUPS.map((group) => [group, new Map()]));
  const put = (group, name, content) => {
    for (const [key, text] of flat(name, content)) found[group].set(key.replaceAll("_", " "), text);
  };
  for (const name of FACETS) put("Record", name, value(name, i));
  put("Record", "index", data.index[i]);
  put("Record", "image", data.image[i]);
  put("Picture", "file", fileName(i));
  put("Picture", markOf(i) === "of another program" ? "made" : "out of date", markOf(i));
  for (const [name, column] of Object.entries(data.own)) {
    const as = SHOWN_AS[name], text = column[i];
    const shown = as && text !== null ? as(String(text)) : text;
    const group = name === "file_id" ? "Record" : name.endsWith(" digest") ? "Embeddings" : "Picture";
    put(group, name, shown);
  }
  const { settings, fingerprint, versions, ...rest } = data.values.shared[data.shared[i]];
  put("Settings", "", settings);
  put("Settings", "fingerprint", fingerprint);
  for (const [name, content] of Object.entries(rest)) {
    put(EMBEDDINGS.has(name) ? "Embeddings" : "Made with", name, content);
  }
  put("Made with", "", versions);
  return found;
}

function factTable(pictures) {
  const found = pictures.map(facts);
  const table = element("table", {}, element("colgroup", {}, element("col"),
    ...pictures.map(() => element("col"))));
  for (const group of GROUPS) {
    const names = new Set(found.flatMap((each) => [...each[group].keys()]));
    if (!names.size) continue;
    const body = element("tbody", {}, element("tr", {},
      element("th", { className: "group", colSpan: pictures.length + 1, scope: "rowgroup" }, group)));
    for (const name of names) {
      const texts = found.map((each) => each[group].get(name) ?? "");
      const same = texts.every((text) => text === texts[0]);
      const row = element("tr", {}, element("th", { scope: "row" }, name));
      if (same) row.append(element("td", { colSpan: pictures.length }, texts[0]));
      else {
        row.className = "differs";
        row.append(...texts.map((text) => element("td", {}, text)));
      }
      body.append(row);
    }
    table.append(body);
  }
  return table;
}

function large(i, alt) {
  const image = element("img", { alt });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 200));
  image.addEventListener("error", () => image.replaceWith(
    element("p", { className: "missing" }, `${fileName(i)} is not there any more`)));
  image.src = pictureUrl(i);
  return image;
}

function wipe(i, other) {
  const left = roundName(i), right = roundName(other);
  const range = element("input", { type: "range", min: 0, max: 100, step: 1, value: 50,
    "aria-label": `Share of ${left}, the rest is ${right}` });
  const frame = element("div", { className: "wipe" }, large(i, left), large(other, right),
    element("div", { className: "line" }), range, element("span", { className: "label" }, left),
    element("span", { className: "label" }, right));
  range.addEventListener("input", () => frame.style.setProperty("--at", `${range.value}%`));
  return frame;
}

function link(i, text) {
  return element("a", { href: pictureUrl(i), target: "_blank", rel: "noopener" }, text);
}

function show(at) {
  activate(at);
  const i = items[active];
  const other = partner ? partner.get(i) : null;
  const pictures = partner ? [i, other] : [i];
  $("viewer").classList.toggle("pair", partner !== null);
  $("stage").replaceChildren(partner ? wipe(i, other) : large(i, `${value("class", i)}, ${roundName(i)}`));
  $("viewer-title").textContent = value("class", i);
  $("place").textContent = `${number(active + 1)} of ${number(items.length)}`;
  const links = partner ? pictures.map((p) => link(p, roundName(p))) : [link(i, "Open the file")];
  $("viewer-links").replaceChildren(...links);
  $("facts").replaceChildren(factTable(pictures));
  $("facts").scrollTop = 0;
  $("previous").disabled = active === 0;
  $("next").disabled = active === items.length - 1;
}

function open(at) {
  show(at);
  if (!$("viewer").open) $("viewer").showModal();
  $("facts").focus({ focusVisible: false });
}

function viewerKey(event) {
  const ranged = event.target.type === "range";
  if (event.key === "ArrowLeft" && !ranged && active > 0) show(active - 1);
  else if (event.key === "ArrowRight" && !ranged && active < items.length - 1) show(active + 1);
  else return;
  event.preventDefault();
}

/* Comparing */

function setCompare(on) {
  $("compare").setAttribute("aria-pressed", on);
  $("rounds").hidden = !on;
  partner = null;
  if (on) pair();
  refresh();
}

function buildCompare() {
  const names = data.values.round;
  rounds = [0, names.length - 1];
  $("compare").disabled = names.length < 2;
  if (names.length < 2) $("compare").title = "There is only one round";
  ["left", "right"].forEach((side, which) => {
    const select = $(side);
    names.forEach((name, place) => select.append(element("option", { value: place }, `round ${name}`)));
    select.value = rounds[which];
    select.addEventListener("change", () => {
      rounds[which] = Number(select.value);
      pair();
      refresh();
    });
  });
  $("compare").addEventListener("click", () => setCompare(partner === null));
}

function pageKey(event) {
  const typing = event.target.matches("input, select");
  if (event.ctrlKey || event.metaKey || event.altKey || $("viewer").open) return;
  if (event.key === "/" && !typing) {
    $("search").focus();
    $("search").select();
  } else if (event.key.toLowerCase() === "c" && !typing && !$("compare").disabled) $("compare").click();
  else if (event.key === "Escape" && event.target === $("search")) {
    $("search").value = "";
    search();
    refresh();
    $("grid").focus();
  } else if (event.key === "Enter" && event.target === $("search")) $("grid").focus();
  else return;
  event.preventDefault();
}

$("title").textContent = data.title;
buildFilters();
buildCompare();
$("filters").addEventListener("click", (event) => {
  const button = event.target.closest("li button");
  if (!button) return;
  const set = chosen[button.dataset.facet], place = Number(button.dataset.place);
  if (!set.delete(place)) set.add(place);
  refresh();
});
for (const button of document.querySelectorAll(".clear")) button.addEventListener("click", clearFilters);
$("search").addEventListener("input", () => { search(); refresh(); });
$("grid").addEventListener("scroll", draw, { passive: true });
$("grid").addEventListener("keydown", gridKey);
document.addEventListener("pointerdown", () => $("grid").classList.remove("keyed"));
$("cells").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) open(Number(cell.dataset.at));
});
$("viewer").addEventListener("keydown", viewerKey);
$("viewer").addEventListener("close", () => {
  $("stage").replaceChildren();
  // The event comes a little later: whoever pressed "/" meanwhile is in the search already.
  if (document.activeElement !== $("search")) $("grid").focus();
});
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
$("previous").addEventListener("click", () => show(active - 1));
$("next").addEventListener("click", () => show(active + 1));
$("close").addEventListener("click", () => $("viewer").close());
document.addEventListener("keydown", pageKey);
new ResizeObserver(layout).observe($("grid"));
refresh();
$("grid").focus({ focusVisible: false });
})();
