/* Search: every word has to be in what is known of a picture. */

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
