/* The same samples of two rounds side by side. */

function pair() {
  const name = (i) => [data.node[i], data.split[i], data.class[i], data.sample[i], data.image[i]].join();
  const right = new Map();
  for (let i = 0; i < total; i++) if (data.round[i] === rounds[1]) right.set(name(i), i);
  partner = new Map();
  for (let i = 0; i < total; i++) {
    const other = data.round[i] === rounds[0] ? right.get(name(i)) : undefined;
    if (other !== undefined) partner.set(i, other);
  }
}

function setCompare(on) {
  $("compare").setAttribute("aria-pressed", on);
  $("rounds").hidden = !on;
  partner = null;
  if (on) pair();
  refresh();
}

function buildCompare() {
  const names = data.values.round;
  rounds = [0, names.length - 1];
  $("compare").disabled = names.length < 2;
  if (names.length < 2) $("compare").title = "There is only one round";
  ["left", "right"].forEach((side, which) => {
    const select = $(side);
    names.forEach((name, place) => select.append(element("option", { value: place }, `round ${name}`)));
    select.value = rounds[which];
    select.addEventListener("change", () => {
      rounds[which] = Number(select.value);
      pair();
      refresh();
    });
  });
  $("compare").addEventListener("click", () => setCompare(partner === null));
}
