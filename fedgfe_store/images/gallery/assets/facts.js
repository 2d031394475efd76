/* What is known of each picture, and how it is said in words. */

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const total = data.file.length;

const KEYS = ["node", "round", "split", "class"];
// What pictures can be filtered by and compared in: keys, and what else they differ in.
const FACETS = data.facets;
const SETTINGS = FACETS.filter((name) => ![...KEYS, "image", "folder"].includes(name));
const VARYING = FACETS.filter((name) => data.values[name].length > 1);

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
const titleOf = (name) => name[0].toUpperCase() + name.slice(1);

function fileName(i) {
  if (!data.file[i].includes("%")) return data.file[i];
  try { return decodeURIComponent(data.file[i]); } catch { return data.file[i]; }
}
const pictureUrl = (i) => data.pictures[data.folder[i]] + data.file[i];
const thumbnailUrl = (i) =>
  `${data.thumbnails[data.folder[i]]}${data.file[i].replace(/\.png$/, "")}.webp`;
const markOf = (i) => (data.mark && data.mark[i]) || "";
const isForeign = (i) => markOf(i) === "of another program";

/** A value in words that say what it is of: "round 5", "server". */
function said(name, text) {
  const plain = ["class", "split", "model", "folder"].includes(name);
  return plain || (name === "node" && !/^\d+$/.test(text)) ? text : `${name} ${text}`;
}
const saidOf = (name, i) => said(name, value(name, i));

// Where each folder has settings of its own, as those of a sweep have, these say more than its name.
const FOLDERS_TELL = (() => {
  const settings = (i) => SETTINGS.map((name) => data[name][i]).join();
  const found = new Set(data.file.map((_, i) => settings(i)));
  return FACETS.includes("folder") && found.size < data.values.folder.length;
})();

/** Which picture it is besides its class: of its record, and of how it was made. */
function where(i, names = FACETS) {
  const used = (name) => names.includes(name);
  const record = [
    ...(used("node") ? [["node", saidOf("node", i)]] : []),
    ["split", used("split") ? `${value("split", i)} ${data.index[i]}` : `index ${data.index[i]}`],
    ...(used("image") && Number(value("image", i)) ? [["image", saidOf("image", i)]] : []),
    ...(used("round") ? [["round", saidOf("round", i)]] : []),
  ];
  const made = SETTINGS.filter(used).map((name) => [name, saidOf(name, i)]);
  if (FOLDERS_TELL && used("folder")) made.push(["folder", value("folder", i)]);
  return { record, made };
}
const words = (told) => told.map(([, text]) => text);
