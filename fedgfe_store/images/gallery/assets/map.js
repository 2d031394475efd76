/* The map of a page that has one: a point for each picture, which shows it when it is pointed at. */

const map = data.map ? makeMap() : null;
const pictures = () => (map && map.isOn() ? map.field : $("grid"));

function makeMap() {
  const { x, y, title } = data.map;
  const KEYS = ["class", "node", "round", "split"];
  const RADIUS = 4, REACH = 18, MARGIN = 24, MOST_NAMED = 24;
  const right = x.reduce((most, each) => Math.max(most, each ?? 0), 0.01);
  const bottom = y.reduce((most, each) => Math.max(most, each ?? 0), 0.01);

  let near = -1;        // place in `items` of the point that shows its picture
  let colours = [];
  let scale = 1, left = 0, top = 0;

  const canvas = element("canvas", { "aria-hidden": "true" });
  const select = element("select", {}, ...KEYS.map((key) => element("option", { value: key }, titleOf(key).toLowerCase())));
  const legend = element("ul", { className: "legend" });
  const told = element("p", { className: "told", "aria-live": "polite" });
  const card = element("div", { className: "card", hidden: true });
  const field = element("div", { className: "field", tabIndex: 0, role: "group",
    "aria-label": `${title}. Arrow keys go from point to point, Enter opens the picture.` }, canvas, card);
  const view = element("div", { id: "map", hidden: true },
    element("div", { className: "above" }, element("p", {}, title),
      element("label", {}, "Colour ", select)),
    field, legend, told);
  const toggle = element("button", { id: "show-map", type: "button", "aria-pressed": "false",
    "aria-keyshortcuts": "m" }, "Map");

  const caption = (i) => words(where(i).record).join(", ");
  const isOn = () => !view.hidden;
  const isThere = (i) => x[i] !== null;
  const at = (i) => [left + x[i] * scale, top + y[i] * scale];

  /* Colours: classes and nodes apart in hue, rounds from light to dark. */

  function palette(key, count) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return Array.from({ length: count }, (_, place) => {
      if (key === "round") {
        const share = count > 1 ? place / (count - 1) : 1;
        return `hsl(${200 + 60 * share} 75% ${dark ? 85 - 45 * share : 75 - 45 * share}%)`;
      }
      const round = Math.floor(place / 10), hue = (place % 10) * 36 + round * 18;
      return `hsl(${hue} ${70 - 25 * (round % 2)}% ${(dark ? 62 : 42) + 9 * (place % 2)}%)`;
    });
  }

  function paint() {
    const key = select.value, values = data.values[key];
    colours = palette(key, values.length);
    legend.replaceChildren(...values.slice(0, MOST_NAMED).map((text, place) =>
      element("li", {}, element("i", { style: `background: ${colours[place]}` }), String(text))));
    if (values.length > MOST_NAMED) {
      legend.append(element("li", {}, `and ${values.length - MOST_NAMED} more`));
    }
    drawPoints();
  }

  function fit() {
    if (!isOn()) return;
    const { clientWidth: width, clientHeight: height } = field;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    scale = Math.min((width - 2 * MARGIN) / right, (height - 2 * MARGIN) / bottom);
    left = (width - right * scale) / 2;
    top = (height - bottom * scale) / 2;
    drawPoints();
  }

  function dot(brush, i, radius) {
    const [px, py] = at(i);
    brush.beginPath();
    brush.arc(px, py, radius, 0, 2 * Math.PI);
  }

  function drawPoints() {
    if (!isOn()) return;
    const brush = canvas.getContext("2d"), style = getComputedStyle(view);
    const key = select.value;
    brush.clearRect(0, 0, field.clientWidth, field.clientHeight);
    brush.fillStyle = brush.strokeStyle = style.getPropertyValue("--line");
    for (let i = 0; i < x.length; i++) {
      if (isThere(i)) { dot(brush, i, RADIUS / 2); brush.fill(); }
    }
    for (const i of items) {
      if (!isThere(i)) continue;
      brush.fillStyle = brush.strokeStyle = colours[data[key][i]];
      const other = partner && partner.get(i);
      if (other !== null && other !== undefined && isThere(other)) {
        brush.beginPath();
        brush.moveTo(...at(i));
        brush.lineTo(...at(other));
        brush.stroke();
        brush.strokeStyle = colours[data[key][other]];
        dot(brush, other, RADIUS);
        brush.stroke();
      }
      dot(brush, i, RADIUS);
      brush.fill();
    }
    if (near >= 0) {
      brush.strokeStyle = style.getPropertyValue("--ink");
      brush.lineWidth = 2;
      dot(brush, items[near], RADIUS + 4);
      brush.stroke();
      brush.lineWidth = 1;
    }
  }

  /* The point that shows its picture */

  function point(place) {
    near = place;
    card.hidden = place < 0;
    if (place >= 0) {
      const i = items[place], [px, py] = at(i);
      card.replaceChildren(thumbnail(i), element("b", {}, value("class", i)), element("span", {}, caption(i)));
      told.textContent = `${value("class", i)}, ${caption(i)}`;
      const width = field.clientWidth, height = field.clientHeight;
      card.style.left = `${Math.max(0, Math.min(width - card.offsetWidth, px + 14))}px`;
      const above = py - card.offsetHeight - 14;
      card.style.top = `${above >= 0 ? above : Math.min(height - card.offsetHeight, py + 14)}px`;
      if (px + 14 + card.offsetWidth > width) {
        card.style.left = `${Math.max(0, px - 14 - card.offsetWidth)}px`;
      }
    }
    drawPoints();
  }

  function nearest(px, py, reach) {
    let found = -1, best = reach * reach;
    items.forEach((i, place) => {
      if (!isThere(i)) return;
      const [ix, iy] = at(i), far = (ix - px) ** 2 + (iy - py) ** 2;
      if (far <= best) [found, best] = [place, far];
    });
    return found;
  }

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  /* The nearest point that lies more in the direction of the arrow than beside it. */
  function beside([dx, dy]) {
    const [px, py] = at(items[near]);
    let found = near, best = Infinity;
    items.forEach((i, place) => {
      if (!isThere(i)) return;
      const [ix, iy] = at(i), along = (ix - px) * dx + (iy - py) * dy;
      const across = Math.abs((ix - px) * dy) + Math.abs((iy - py) * dx);
      if (along > 0 && across <= along && along + 2 * across < best) [found, best] = [place, along + 2 * across];
    });
    return found;
  }

  function mapKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in STEPS) {
      point(near < 0 ? items.findIndex(isThere) : beside(STEPS[event.key]));
    } else if ((event.key === "Enter" || event.key === " ") && near >= 0) openStep(near);
    else if (event.key === "Escape" && near >= 0) point(-1);
    else return;
    event.preventDefault();
  }

  function under(event) {
    const frame = field.getBoundingClientRect();
    return nearest(event.clientX - frame.left, event.clientY - frame.top, REACH);
  }

  function turn(on) {
    if (on === isOn()) return;
    view.hidden = !on;
    $("grid").hidden = on;
    toggle.setAttribute("aria-pressed", on);
    if (on) { fit(); field.focus({ focusVisible: false }); }
    else $("grid").focus();
  }

  field.addEventListener("keydown", mapKey);
  field.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && !card.contains(event.target)) point(under(event));
  });
  field.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") point(-1); });
  /* A mouse has shown the picture already; a finger's first tap shows it, the next one opens it. */
  let shown = -1;
  field.addEventListener("pointerdown", () => { shown = near; });
  field.addEventListener("click", (event) => {
    const found = card.contains(event.target) ? near : under(event);
    if (found >= 0 && found === shown) openStep(found);
    else point(found);
  });
  select.addEventListener("change", paint);
  toggle.addEventListener("click", () => {
    turn(!isOn());
    step();
  });
  $("grid").after(view);
  $("search").before(toggle);
  new ResizeObserver(fit).observe(field);

  $("viewer").addEventListener("close", () => { 
    if (isOn()) point(items.length && isThere(items[active]) ? active : -1);
  });

  const address = {
    read: (params) => turn(params.get("view") === "map"),
    write: (params) => { if (isOn()) params.set("view", "map"); },
  };
  return { isOn, field, toggle, address, update: () => { point(-1); paint(); } };
}
