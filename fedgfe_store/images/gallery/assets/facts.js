/* What is known of each picture, and what is shown of them now. */

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
