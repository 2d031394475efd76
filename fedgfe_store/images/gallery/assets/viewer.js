/* One picture, or two with a slider, and how they were made. */

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
  for (const name of KEYS) put("Record", name, value(name, i));
  put("Record", "index", data.index[i]);
  put("Record", "image", value("image", i));
  put("Picture", "file", fileName(i));
  if (FACETS.includes("folder")) put("Picture", "folder", value("folder", i));
  if (isForeign(i)) put("Picture", "made by", "another program");
  else put("Picture", "out of date", markOf(i));
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
  const left = saidOf(compared.by, i), right = saidOf(compared.by, other);
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
  const i = opened = items[active];
  const other = partner ? partner.get(i) : null;
  const pictures = partner ? [i, other] : [i];
  $("viewer").classList.toggle("pair", partner !== null);
  const alone = () => large(i, [heading(i, null), ...words(where(i).record)].join(", "));
  $("stage").replaceChildren(partner ? wipe(i, other) : alone());
  $("viewer-title").textContent = heading(i, other);
  $("place").textContent = `${number(active + 1)} of ${number(items.length)}`;
  const links = partner ? pictures.map((p) => link(p, saidOf(compared.by, p))) : [link(i, "Open the file")];
  $("viewer-links").replaceChildren(...links);
  $("facts").replaceChildren(factTable(pictures));
  $("facts").scrollTop = 0;
  $("previous").disabled = active === 0;
  $("next").disabled = active === items.length - 1;
}

let opened = null;  // the picture that is open; null while none is

function open(at) {
  show(at);
  if (!$("viewer").open) $("viewer").showModal();
  $("facts").focus({ focusVisible: false });
}

/** Go on to another picture: going back from it closes it, rather than show the one before. */
function turn(to) {
  show(to);
  change();
}

function openStep(at) {
  open(at);
  step({ opened: true });
}

function closed() {
  const byHand = opened !== null;
  opened = null;
  $("stage").replaceChildren();
  // The event comes a little later: whoever pressed "/" meanwhile is in the search already.
  if (document.activeElement !== $("search")) pictures().focus();
  if (!byHand) return;
  settle();
  if (history.state?.opened) history.back();
  else put("replaceState", null, address().url);
}

function viewerKey(event) {
  const ranged = event.target.type === "range";
  if (event.key === "ArrowLeft" && !ranged && active > 0) turn(active - 1);
  else if (event.key === "ArrowRight" && !ranged && active < items.length - 1) turn(active + 1);
  else return;
  event.preventDefault();
}

function buildViewer() {
  const viewer = $("viewer");
  viewer.addEventListener("keydown", viewerKey);
  viewer.addEventListener("close", closed);
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  $("previous").addEventListener("click", () => turn(active - 1));
  $("next").addEventListener("click", () => turn(active + 1));
  $("close").addEventListener("click", () => viewer.close());
}

// Names of files are those of one folder only.
const nameOf = (i) => (FACETS.includes("folder") ? `${value("folder", i)}/` : "") + data.file[i];

const viewerAddress = {
  read(params) {
    const wanted = params.get("open");
    const at = wanted === null ? -1 : items.findIndex((i) => nameOf(i) === wanted);
    if (at >= 0) open(at);
    else if ($("viewer").open) {
      opened = null;
      $("viewer").close();
    }
  },
  write(params) {
    if (opened !== null) params.set("open", nameOf(opened));
  },
};
