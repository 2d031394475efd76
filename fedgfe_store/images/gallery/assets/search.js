/* Search: every word and every "quoted phrase" has to be in what is known of a picture. */

let matches = new Uint8Array(total).fill(1);
const plainTexts = new Array(total), codeTexts = new Array(total);
const LONG = 6;  // from so many signs on a word may be part of a digest, seed or time
const CODES = /digest$|^(seed|created|seconds|bytes|revision|fingerprint|store_id|versions)$/;

// Names of files and classes have "_" for spaces; lines part one fact from the next.
const normal = (text) => String(text).toLowerCase().replace(/(?:_|[^\S\n])+/g, " ");

/** What is asked: parts in words or in quotes, of which those that are closed are whole words. */
function asked(text) {
  const parts = [];
  for (const [, phrase, end, word] of text.matchAll(/["“”„]([^"“”„]*)(["“”„]|$)|([^\s"“”„]+)/g)) {
    const wanted = normal(phrase ?? word).trim();
    if (wanted) parts.push({ wanted, test: end ? whole(wanted) : (found) => found.includes(wanted) });
  }
  return parts;
}

function whole(phrase) {
  const literal = phrase.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${literal}(?![\\p{L}\\p{N}])`, "u");
  return (found) => pattern.test(found);
}

const columnsOf = (wanted) =>
  Object.entries(data.own).filter(([name]) => wanted(name)).map(([, column]) => column);
const plainColumns = columnsOf((name) => !CODES.test(name)), codeColumns = columnsOf((name) => CODES.test(name));

const saidValues = [...KEYS, ...(FACETS.includes("folder") ? ["folder"] : [])].map((name) =>
  [data[name], data.values[name].map((text) => normal(said(name, String(text))))]);

/** What is known of a picture in words. */
function plainText(i) {
  if (plainTexts[i] !== undefined) return plainTexts[i];
  let own = `${fileName(i)}\n${data.index[i]}\n${markOf(i)}`;
  for (const column of plainColumns) if (column[i] !== null) own += `\n${column[i]}`;
  own = normal(own);
  for (const [places, texts] of saidValues) own += `\n${texts[places[i]]}`;
  return plainTexts[i] = own;
}

/** What is known of it as codes, some of which few letters would meet by chance. */
const codeText = (i) => codeTexts[i] ??= normal(codeColumns.map((column) => column[i] ?? "").join("\n"));

function sharedTexts(facts) {
  const found = { plain: [], code: [] };
  for (const [name, content] of Object.entries({ ...facts, ...facts.settings, settings: null })) {
    for (const [key, text] of flat(name, content)) {
      found[CODES.test(name) ? "code" : "plain"].push(normal(`${key} ${text}`));
    }
  }
  return [found.plain.join("\n"), found.code.join("\n")];
}
const sharedKnown = data.values.shared.map(sharedTexts);

function search() {
  const parts = asked($("search").value).map(({ wanted, test }) => {
    const isLong = wanted.length >= LONG;
    // What many pictures share is looked at once.
    const shared = sharedKnown.map(([plain, code]) => test(plain) || (isLong && test(code)));
    return (i) => shared[data.shared[i]] || test(plainText(i)) || (isLong && test(codeText(i)));
  });
  for (let i = 0; i < total; i++) matches[i] = parts.every((meets) => meets(i)) ? 1 : 0;
}

const whenIdle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));

/** Put the texts together while nobody waits for them. */
function prepareSearch(from = 0) {
  const end = Math.min(total, from + 1000);
  for (let i = from; i < end; i++) plainText(i);
  if (end < total) whenIdle(() => prepareSearch(end));
}

const searchAddress = {
  read(params) {
    $("search").value = params.get("search") ?? "";
    search();
  },
  write(params) {
    if ($("search").value.trim()) params.set("search", $("search").value.trim());
  },
};
