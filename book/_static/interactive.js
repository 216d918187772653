// The two pages that answer to the mouse and to the keyboard. Without this file the same pages
// show a whole table and a figure. Data and words stand in the pages, made from stored results.

const make = (name, facts = {}, ...inside) => {
  const svg = ["svg", "rect", "path", "polyline", "circle"].includes(name);
  const one = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(facts)) one.setAttribute(key, value);
  one.append(...inside);
  return one;
};

// --- the table of methods: sort by a column's head, filter by data, cost and kind -----------------

function methodsTable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const value = (row, column) => {
    const { dataset, textContent } = row.cells[column];
    return "value" in dataset ? Number(dataset.value || "NaN") : textContent;
  };
  const missing = (one) => typeof one === "number" && Number.isNaN(one);
  const sort = (column, rising) => {
    const order = (a, b) => {
      const [one, other] = [value(a, column), value(b, column)];
      if (missing(one) || missing(other)) return missing(one) - missing(other); // always last
      return (one < other ? -1 : one > other ? 1 : 0) * (rising ? 1 : -1);
    };
    body.append(...rows.sort(order));
    [...table.tHead.rows[0].cells].forEach((head, number) =>
      head.setAttribute("aria-sort", number !== column ? "none" : rising ? "ascending" : "descending"));
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button" }, head.textContent);
    const first = typeof value(rows[0], column) !== "number" || "low" in head.dataset;
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      sort(column, now === "ascending" ? false : now === "descending" ? true : first);
    });
    head.replaceChildren(button);
  });
  const kinds = [...new Set(rows.map((row) => row.dataset.data))];
  const data = make("select", {}, make("option", { value: "" }, "any"),
    ...kinds.map((kind) => make("option", { value: kind }, kind)));
  const seconds = make("input", { type: "number", min: 0, step: "any" });
  const single = make("input", { type: "checkbox" });
  const count = make("output", { role: "status" });
  const filter = () => {
    for (const row of rows) {
      row.hidden = (data.value && row.dataset.data !== data.value)
        || (seconds.value && !(Number(row.dataset.seconds) <= Number(seconds.value)))
        || (single.checked && row.dataset.models !== "1");
    }
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} methods`;
  };
  const form = make("form", { class: "controls", "aria-label": "Filters of the table" },
    make("label", {}, "data: ", data), make("label", {}, "seconds of a merge, at most: ", seconds),
    make("label", {}, single, " one model only"), count);
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  table.parentElement.before(form);
  filter();
}

// --- the plane of two coefficients: drag a point over what was measured ---------------------------

const SHADES = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const shade = (share) => {
  const at = Math.min(0.9999, Math.max(0, share)) * (SHADES.length - 1);
  const [low, high] = [SHADES[Math.floor(at)], SHADES[Math.floor(at) + 1]];
  return `rgb(${low.map((one, n) => Math.round(one + (at % 1) * (high[n] - one)))})`;
};
const MARKERS = {
  s: "M-4-4H4V4H-4Z", D: "M0-5.5L5.5 0 0 5.5-5.5 0Z", "^": "M0-5.5L5 4H-5Z",
  o: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0",
};
const SIDE = 320;

function plane(place) {
  const pairs = JSON.parse(place.querySelector("script").textContent);
  const pick = (names, label) => {
    const select = make("select", {}, ...names.map((name) => make("option", { value: name }, name)));
    return [select, make("label", {}, `${label}: `, select)];
  };
  const [pair, pairLabel] = pick(Object.keys(pairs), "pair of tasks");
  const [measure, measureLabel] = pick(Object.keys(Object.values(pairs)[0].measures), "colour");
  const picture = make("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, role: "img", class: "plane" });
  const sliders = [0, 1].map(() => make("input", { type: "range", step: 1, min: 0 }));
  const names = sliders.map(() => make("span"));
  const readings = make("table", { class: "readings", "aria-live": "polite" });
  const point = make("circle", { r: 7, class: "point" });
  let now = Object.values(pairs)[0];

  const coordinates = (first, second) => {
    const [low, high] = [now.axis[0], now.axis.at(-1)];
    const cell = SIDE / now.axis.length;
    const along = (one) => cell / 2 + ((one - low) / (high - low)) * (SIDE - cell);
    return [along(first), SIDE - along(second)];
  };
  const row = (title, mark, cells) => make("tr", {}, make("th", { scope: "row" }, mark, title),
    ...cells.map((cell) => make("td", {}, cell)));
  const swatch = (one) => make("svg", { viewBox: "-7 -7 14 14", width: 14, "aria-hidden": "true" },
    make("path", { d: MARKERS[one.marker], fill: one.colour }));

  const read = () => {
    const [first, second] = sliders.map((slider) => Number(slider.value));
    const [x, y] = coordinates(now.axis[first], now.axis[second]);
    point.setAttribute("cx", x);
    point.setAttribute("cy", y);
    sliders.forEach((slider, n) => {
      names[n].textContent = `λ of ${now.tasks[n]}: ${now.axis[Number(slider.value)].toFixed(2)} `;
      slider.setAttribute("aria-valuetext", now.axis[Number(slider.value)].toFixed(2));
    });
    const found = Object.values(now.measures).map((table) => table[first][second]);
    const at = [now.axis[first], now.axis[second]].map((one) => one.toFixed(2));
    const columns = [...now.tasks.map((task) => `λ of ${task}`), ...Object.keys(now.measures)];
    const head = make("tr", {}, make("th", { scope: "col" }, "model"),
      ...columns.map((name) => make("th", { scope: "col" }, name)));
    const digits = Object.values(now.digits);
    const words = (values) => values.map((one, n) => one.toFixed(digits[n]));
    readings.replaceChildren(
      make("caption", {}, "At the point, and where each method ends"), make("thead", {}, head),
      make("tbody", {}, row("the point", "", [...at, ...words(found)]),
        ...now.methods.map((one) => row(` ${one.title}`, swatch(one),
          [...one.path.at(-1).map((l) => l.toFixed(2)), ...words(one.values)]))));
  };
  const draw = () => {
    now = pairs[pair.value];
    const table = now.measures[measure.value];
    const every = table.flat();
    const [low, high] = [Math.min(...every), Math.max(...every)];
    const cell = SIDE / now.axis.length;
    const better = (one) => (now.lower.includes(measure.value) ? high - one : one - low) / (high - low);
    const squares = now.axis.flatMap((_, i) => now.axis.map((_, j) => make("rect", {
      x: i * cell, y: SIDE - (j + 1) * cell, width: cell + 0.5, height: cell + 0.5,
      fill: shade(better(table[i][j])) })));
    const ends = now.methods.flatMap((one) => {
      const places = one.path.map((step) => coordinates(...step));
      return [
        make("polyline", { points: places.join(" "), fill: "none", stroke: one.colour, "stroke-width": 2 }),
        make("path", { d: MARKERS[one.marker], fill: one.colour, stroke: "black",
          transform: `translate(${places.at(-1)})` })];
    });
    picture.setAttribute("aria-label", `${measure.value} over the coefficients of ${now.tasks.join(" and ")}; `
      + "yellow is better. The sliders below move the point.");
    picture.replaceChildren(...squares, ...ends, point);
    sliders.forEach((slider) => slider.setAttribute("max", now.axis.length - 1));
    read();
  };
  const move = (event) => {
    const frame = picture.getBoundingClientRect();
    const count = now.axis.length;
    const share = [(event.clientX - frame.left) / frame.width, (frame.bottom - event.clientY) / frame.height];
    sliders.forEach((slider, n) => {
      slider.value = Math.min(count - 1, Math.max(0, Math.floor(share[n] * count)));
    });
    read();
  };
  picture.addEventListener("pointerdown", (event) => {
    picture.setPointerCapture(event.pointerId);
    move(event);
  });
  picture.addEventListener("pointermove", (event) => event.buttons && move(event));
  pair.addEventListener("input", draw);
  measure.addEventListener("input", draw);
  place.append(make("form", { class: "controls" }, pairLabel, measureLabel), picture,
    ...sliders.map((slider, n) => make("label", {}, names[n], slider)),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Readings" }, readings));
  sliders.forEach((slider) => {
    slider.setAttribute("max", now.axis.length - 1);
    slider.value = now.axis.findIndex((one) => one >= 0.5);
    slider.addEventListener("input", read);
  });
  draw();
  document.querySelectorAll(".static").forEach((figure) => { figure.hidden = true; });
}

// --- what the theme leaves out: names for its buttons, and the keyboard's way to what scrolls -----

function repairTheme() {
  document.querySelectorAll("summary").forEach((one) => {
    if (one.textContent.trim()) one.removeAttribute("aria-label");
    else one.setAttribute("aria-label", "show or hide the pages below");
  });
  document.querySelectorAll(".search-button-field").forEach((one) => one.removeAttribute("aria-label"));
  document.querySelectorAll(".citation-list").forEach((one) => one.removeAttribute("role"));
  const wide = ".bd-content :is(pre, .text_html, div.math, mjx-container, .pst-scrollable-table-container)";
  document.querySelectorAll(wide).forEach((one) => {
    if (one.scrollWidth > one.clientWidth) one.setAttribute("tabindex", 0);
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.methods").forEach(methodsTable);
  document.querySelectorAll("div.plane").forEach(plane);
});
for (const event of ["load", "resize"]) window.addEventListener(event, repairTheme);
