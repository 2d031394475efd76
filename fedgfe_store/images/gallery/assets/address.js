/* What is shown is in the page's address: it can be reloaded, gone back to, kept and shared. */

const ADDRESSED = [filterAddress, searchAddress, compareAddress, ...(map ? [map.address] : [])];
const SETTLED = 250;  // milliseconds: browsers refuse an address that changes with every key
let waiting = null;   // address that is put into the present entry once typing pauses
let timer = 0;

function address() {
  const params = new URLSearchParams();
  for (const part of ADDRESSED) part.write(params);
  const shown = params.toString();
  viewerAddress.write(params);
  const text = params.toString();
  return { url: location.href.split("#")[0] + (text ? `#${text}` : ""), shown };
}

function put(method, state, url) {
  try {
    history[method](state, "", url);
  } catch (error) {
    // A viewer that shows the page without an address of its own, as notebooks do, has no history.
    if (error.name !== "SecurityError") throw error;
  }
}

/** What a person would go back from: a new entry of the history. */
function step(state = null) {
  settle();
  const { url } = address();
  if (url !== location.href) put("pushState", state, url);
}

/** What changes with every key: the same entry. */
function change() {
  waiting = address().url;
  clearTimeout(timer);
  timer = setTimeout(settle, SETTLED);
}

function settle() {
  clearTimeout(timer);
  if (waiting !== null && waiting !== location.href) put("replaceState", history.state, waiting);
  waiting = null;
}

/** Show what the address says. */
function follow(first = false) {
  clearTimeout(timer);
  waiting = null;
  const before = address().shown;
  const params = new URLSearchParams(location.hash.slice(1));
  for (const part of ADDRESSED) part.read(params);
  // Back from a picture leaves the grid where it was.
  if (first || address().shown !== before) refresh();
  viewerAddress.read(params);
}

window.addEventListener("popstate", () => follow());
window.addEventListener("pagehide", settle);
