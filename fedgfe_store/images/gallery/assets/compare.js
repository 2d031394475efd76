/* Two values of a key, a setting or a folder: the same samples side by side. */

let compared = null;  // what is compared, and the places of its two values; null while nothing is
let partner = null;   // right picture of each left one, while values are compared

const isCompared = (name) => compared !== null && compared.by === name;

/** What two pictures that are compared have in common. */
function common() {
  // Folders hold different settings, and settings are in different folders.
  const rest = compared.by === "folder" ? KEYS : [...KEYS, ...SETTINGS];
  return rest.filter((name) => name !== compared.by);
}

/** Whether pictures of one folder can have either value: settings are those of a folder. */
const isInOneFolder = () => KEYS.includes(compared.by) || compared.by === "image";

/** Filters that make sense while values are compared. */
const usedFacets = () => compared === null ? FACETS
  : FACETS.filter((name) => common().includes(name)
    || (name === "image" && !isCompared("image")) || (name === "folder" && isInOneFolder()));

/** Match pictures of the left and of the right value that have no partner by what `name` says. */
function match(lefts, rights, name) {
  const taken = new Set(partner.values());
  const found = new Map();
  for (const i of rights) {
    const said = taken.has(i) ? null : name(i);
    if (said !== null && !found.has(said)) found.set(said, i);
  }
  for (const i of lefts) {
    const other = partner.has(i) ? undefined : found.get(name(i));
    if (other !== undefined) partner.set(i, other);
  }
}

function pair() {
  const { by, left, right } = compared;
  const names = [...common(), ...(by === "image" ? [] : ["image"])];
  const rest = (i) => names.map((name) => data[name][i]).join();
  const lefts = [], rights = [];
  for (let i = 0; i < total; i++) {
    if (data[by][i] === left) lefts.push(i);
    if (data[by][i] === right) rights.push(i);
  }
  const files = data.own.file_id ?? [];
  // Other nodes have other samples: the same file where both have it, else the same place in order.
  const ways = ["node", "split", "class"].includes(by)
    ? [(i) => files[i] ? `${rest(i)} ${files[i]}` : null, (i) => `${rest(i)} ${data.index[i]}`]
    : [(i) => `${rest(i)} ${data.sample[i]}`];
  partner = new Map();
  if (isInOneFolder()) {
    for (const way of ways) {
      match(lefts, rights, (i) => way(i) === null ? null : `${data.folder[i]} ${way(i)}`);
    }
  }
  for (const way of ways) match(lefts, rights, way);
}

function setCompared(next) {
  compared = next;
  partner = null;
  if (compared) pair();
  showCompared();
}

/** The two values of `by` that are compared unless told otherwise. */
const widest = (by) => ({ by, left: 0, right: data.values[by].length - 1 });

function showCompared() {
  $("compare").setAttribute("aria-pressed", compared !== null);
  $("compared").hidden = compared === null;
  if (compared === null) return;
  $("by").value = compared.by;
  for (const side of ["left", "right"]) {
    const options = data.values[compared.by].map((text, place) =>
      element("option", { value: place }, said(compared.by, String(text))));
    $(side).replaceChildren(...options);
    $(side).value = compared[side];
  }
}

function buildCompare() {
  $("compare").disabled = VARYING.length === 0;
  if (VARYING.length === 0) $("compare").title = "There are no two values of anything";
  for (const name of VARYING) $("by").append(element("option", { value: name }, titleOf(name)));
  const usual = ["round", "folder"].find((name) => VARYING.includes(name)) ?? VARYING[0];
  $("compare").addEventListener("click", () => {
    setCompared(compared ? null : widest(usual));
    refresh();
    step();
  });
  $("by").addEventListener("change", () => {
    setCompared(widest($("by").value));
    refresh();
    step();
  });
  for (const side of ["left", "right"]) {
    $(side).addEventListener("change", () => {
      setCompared({ ...compared, [side]: Number($(side).value) });
      refresh();
      step();
    });
  }
}

const compareAddress = {
  read(params) {
    const by = params.get("compare");
    if (!VARYING.includes(by)) {
      setCompared(null);
      return;
    }
    const place = (side) => data.values[by].findIndex((text) => String(text) === params.get(side));
    const { left, right } = widest(by);
    setCompared({
      by,
      left: place("left") < 0 ? left : place("left"),
      right: place("right") < 0 ? right : place("right"),
    });
  },
  write(params) {
    if (compared === null) return;
    const { by, left, right } = compared;
    params.set("compare", by);
    params.set("left", data.values[by][left]);
    params.set("right", data.values[by][right]);
  },
};
