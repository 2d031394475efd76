/* Search: every word and every "quoted phrase" has to be in what is known of a picture. */

let matches = new Uint8Array(total).fill(1);
const plainTexts = new Array(total), codeTexts = new Array(total);
const LONG = 6;  // from so many signs on a word may be part of a digest, seed or time
const CODES = /digest$|^(seed|created|seconds|bytes|revision|fingerprint|store_id|versions)$/;

// Names of files and classes have "_" for spaces.
const normal = (text) => String(text).toLowerCase().replace(/[_\s]+/g, " ");

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

/** All that is known of a picture: in words, and as codes that few letters would meet by chance. */
function texts(i) {
  if (plainTexts[i] === undefined) {
    const own = Object.entries(data.own).map(([name, column]) => [name, column[i] ?? ""]);
    const plain = [...KEYS.map((name) => saidOf(name, i)), data.index[i], fileName(i), markOf(i),
      ...(FACETS.includes("folder") ? [value("folder", i)] : []),
      ...own.filter(([name]) => !CODES.test(name)).map(([, text]) => text)];
    plainTexts[i] = plain.map(normal).join("\n");
    codeTexts[i] = own.filter(([name]) => CODES.test(name)).map(([, text]) => normal(text)).join("\n");
  }
  return [plainTexts[i], codeTexts[i]];
}

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
  const parts = asked($("search").value);
  const meets = ([plain, code], { wanted, test }) =>
    test(plain) || (wanted.length >= LONG && test(code));
  // What many pictures share is looked at once.
  const shared = parts.map((part) => sharedKnown.map((known) => meets(known, part)));
  for (let i = 0; i < total; i++) {
    matches[i] = parts.every((part, p) => shared[p][data.shared[i]] || meets(texts(i), part)) ? 1 : 0;
  }
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
