/* Filters: values of keys to choose from, with how many pictures each would leave. */

const SHOWN_VALUES = 300;
const chosen = Object.fromEntries(FACETS.map((name) => [name, new Set()]));
let items = [];  // numbers of the pictures shown; of pairs, the left one

function refresh() {
  const facets = usedFacets();
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
  showCounts(counts, facets);
  $("grid").scrollTop = 0;
  clearCells();
  layout();
  if (map) map.update();
}

function showCounts(counts, facets) {
  for (const button of document.querySelectorAll("#filters li button")) {
    const { facet, place } = button.dataset;
    const found = counts[facet][place];
    button.lastChild.textContent = number(found);
    button.classList.toggle("none", found === 0);
    button.setAttribute("aria-pressed", chosen[facet].has(Number(place)));
  }
  for (const section of document.querySelectorAll("#filters section")) {
    section.hidden = !facets.includes(section.dataset.section);
  }
  const noun = partner ? "pair" : "picture";
  const all = partner ? partner.size : total;
  $("status").textContent = items.length === all ? plural(all, noun)
    : `${number(items.length)} of ${plural(all, noun)}`;
  const filtered = $("search").value.trim() !== "" || facets.some((name) => chosen[name].size);
  $("nothing").hidden = items.length > 0;
  $("nothing").firstChild.textContent = partner && !filtered
    ? "No sample was drawn with both." : "No picture meets these filters.";
  for (const button of document.querySelectorAll(".clear")) button.hidden = !filtered;
}

function clearFilters() {
  for (const name of FACETS) chosen[name].clear();
  $("search").value = "";
  search();
  refresh();
  step();
  pictures().focus();
}

function buildFacet(facet) {
  const list = element("ul", { className: facet === "class" ? "rows" : "" });
  const values = data.values[facet];
  values.slice(0, SHOWN_VALUES).forEach((text, place) => {
    const button = element("button", { type: "button", title: String(text), "aria-pressed": "false" },
      element("b", {}, String(text)), element("i"));
    button.dataset.facet = facet;
    button.dataset.place = place;
    list.append(element("li", {}, button));
  });
  const section = element("section", { "aria-label": titleOf(facet), "data-section": facet },
    element("h2", {}, titleOf(facet)), list);
  if (values.length > SHOWN_VALUES) {
    section.append(element("p", { className: "more" },
      `and ${number(values.length - SHOWN_VALUES)} more; the search finds them`));
  }
  return section;
}

function buildFilters() {
  const side = $("filters");
  side.append(...FACETS.map(buildFacet));
  const keys = element("dl", { className: "keys", "aria-label": "Keys" });
  for (const [key, use] of [["/", "search"], ["← ↑ ↓ →", "move"], ["Enter", "open"],
    ["C", "compare"], ...(map ? [["M", "map"]] : []), ["Esc", "close, clear the search"]]) {
    keys.append(element("dt", {}, key), element("dd", {}, use));
  }
  side.append(keys);
  side.addEventListener("click", (event) => {
    const button = event.target.closest("li button");
    if (!button) return;
    const set = chosen[button.dataset.facet], place = Number(button.dataset.place);
    if (!set.delete(place)) set.add(place);
    refresh();
    step();
  });
}

const filterAddress = {
  read(params) {
    for (const name of FACETS) {
      const wanted = new Set(params.getAll(name));
      chosen[name].clear();
      data.values[name].forEach((text, place) => {
        if (wanted.has(String(text))) chosen[name].add(place);
      });
    }
  },
  write(params) {
    for (const name of usedFacets()) {
      for (const place of chosen[name]) params.append(name, data.values[name][place]);
    }
  },
};
