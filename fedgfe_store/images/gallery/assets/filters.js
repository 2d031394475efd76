/* Filters: values of keys to choose from, with how many pictures each would leave. */

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
  if (map) map.update();
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
  pictures().focus();
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
    ["C", "compare rounds"], ...(map ? [["M", "map"]] : []), ["Esc", "close, clear the search"]]) {
    keys.append(element("dt", {}, key), element("dd", {}, use));
  }
  side.append(keys);
}
