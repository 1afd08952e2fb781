"use strict";
const COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f", "#bcbd22"];
const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3]];
const charts = []; // those on the page, for whoever looks at it from a console or a test

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// an element with text or elements inside; texts of runs get onto the page here, and as text only
function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

// ---- curves -------------------------------------------------------------------------------------------------------

function curve(run, x, metric) { // [xs, ys] of a metric, or nothing
  const along = run.series[x], [at, ys] = run.series[metric] || [[], []];
  if (!along || !at.length) return null;
  const line = new Map(along[0].map((number, i) => [number, along[1][i]]));
  const kept = at.map((_, i) => i).filter(i => line.has(at[i]));
  return kept.length ? [kept.map(i => line.get(at[i])), kept.map(i => ys[i])] : null;
}

const short = y => y === null ? "" : String(+y.toPrecision(5));

function chart(panel, runs, place) {
  const series = [{ label: panel.x }], bands = [], data = [], log = panel.title.endsWith("log scale");
  const add = (points, options) => {
    data.push(log ? [points[0], points[1].map(y => y > 0 ? y : null)] : points);
    return series.push({ spanGaps: true, width: 1.5, value: (_, y) => y == null ? "–" : short(y), ...options }) - 1;
  };
  runs.forEach((run, r) => panel.metrics.forEach((metric, m) => {
    const points = curve(run, panel.x, metric);
    if (!points) return;
    const stroke = COLORS[(runs.length > 1 ? r : m) % COLORS.length];
    add(points, {
      label: (runs.length > 1 ? run.name + " " : "") + metric, stroke, dash: runs.length > 1 ? DASHES[m % DASHES.length] : [],
      points: { show: points[0].length < 40 },
    });
    const ends = ["_low", "_high"].map(end => curve(run, panel.x, metric + end));
    if (runs.length > 1 || panel.metrics.length > 3 || !ends[0] || !ends[1]) return;
    const [low, high] = ends.map((end, i) => add(end, { label: ["low", "high"][i], stroke: stroke + "40", points: { show: false } }));
    bands.push({ series: [high, low], fill: stroke + "20" });
  }));
  if (!data.length) return;
  const box = make("div", { className: "chart" }), title = make("h3", {}, panel.title);
  box.append(title);
  place.append(box);
  const plot = new uPlot({
    width: 420, height: 260, series, bands, scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [{ label: panel.x.startsWith("time/") ? "seconds" : panel.x, labelSize: 18, size: 34 }, { size: 60, values: (_, ys) => ys.map(short) }],
    padding: [8, 24, 0, 0], cursor: { drag: { x: true, y: true, uni: 40 }, sync: { key: panel.x } },
  }, uPlot.join(data), box);
  title.onclick = () => {
    const large = box.classList.toggle("large");
    plot.setSize(large ? { width: innerWidth - 60, height: 520 } : { width: 420, height: 260 });
  };
  charts.push(plot);
}

// ---- tables: search, a filter for each column that has few values or numbers, order by a click -----------------------

function shown(value) {
  return value === null || value === undefined ? "" : typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}

function filterOf(values, changed) { // [controls, value => whether it may stay]
  const kinds = new Set(values.filter(v => v !== null).map(v => typeof v));
  const few = new Set(values.map(shown));
  if (kinds.size === 1 && kinds.has("number") && few.size > 1) {
    const [low, high] = ["min", "max"].map(placeholder => make("input", { type: "number", step: "any", placeholder, oninput: changed }));
    return [[low, high], v => (low.value === "" || v !== null && v >= +low.value) && (high.value === "" || v !== null && v <= +high.value)];
  }
  if (few.size < 2 || few.size > 12 || [...few].some(v => v.length > 40)) return [[], () => true];
  const select = make("select", { onchange: changed }, ...["", ...few].map(v => make("option", { value: v }, v || "all")));
  return [[select], v => select.value === "" || shown(v) === select.value];
}

function table({ name, columns, data, note }, place) {
  const count = data[0].length, texts = data.map(column => column.map(shown));
  let order = Array.from({ length: count }, (_, i) => i), sorted = null, limit = 50;
  const search = make("input", { type: "search", placeholder: "search", oninput: () => draw() });
  const state = make("span", { className: "count" }), body = make("tbody");
  const more = make("button", { onclick: () => draw(limit + 200) }, "more");
  const filters = data.map(values => filterOf(values, () => draw()));
  const heads = columns.map((column, c) => make("th", { onclick: () => sort(c) }, column));
  function draw(most = 50) {
    limit = most;
    const wanted = search.value.toLowerCase();
    const found = order.filter(i => filters.every(([, keeps], c) => keeps(data[c][i]))
      && (!wanted || texts.some(column => column[i].toLowerCase().includes(wanted))));
    state.textContent = ` ${found.length} of ${count} rows. ${note}`;
    body.replaceChildren(...found.slice(0, limit).map(i => make("tr", {}, ...data.map((column, c) => {
      const kind = typeof column[i] === "boolean" || columns[c] === "verdict" ? texts[c][i] : "";
      return make("td", { className: kind }, make("div", {}, texts[c][i]));
    }))));
    more.hidden = found.length <= limit;
  }
  function sort(c) {
    const up = sorted === c ? -1 : 1;
    sorted = up === 1 ? c : null;
    order.sort((a, b) => up * (data[c][a] < data[c][b] ? -1 : data[c][a] > data[c][b] ? 1 : a - b));
    draw();
  }
  const head = make("thead", {}, make("tr", {}, ...heads), make("tr", {}, ...filters.map(([own]) => make("th", {}, ...own))));
  const open = name !== "Settings";
  place.append(make("details", { id: name, open }, make("summary", {}, name), search, state, make("table", {}, head, body), more));
  draw();
}

// ---- the page ---------------------------------------------------------------------------------------------------------

function media(title, { shown, note }, place) {
  if (!shown.length) return;
  place.append(make("h2", {}, title), make("p", {}, note), make("div", { className: "grid" }, ...shown.map(({ source, text }) => {
    const film = { controls: true, muted: true, loop: true, playsInline: true };
    const seen = source.startsWith("data:video") ? make("video", { src: source, ...film }) : make("img", { src: source });
    return make("figure", {}, seen, make("figcaption", {}, text));
  })));
}

(async () => {
  const data = JSON.parse(document.getElementById("data").textContent), at = id => document.getElementById(id);
  const { panels, runs } = await unpack(data.curves);
  panels.forEach(panel => chart(panel, runs, at("curves")));
  const names = [...new Set(runs.flatMap(run => Object.keys(run.series)))].filter(name => name !== "step");
  at("more").onchange = event => {
    const wanted = event.target.value, some = wanted ? names.filter(name => name.includes(wanted)).slice(0, 24) : [];
    at("others").replaceChildren();
    some.forEach(name => chart({ title: name, x: "step", metrics: [name] }, runs, at("others")));
  };
  for (const title of ["Videos", "Open loop"]) media(title, data[title], at("media"));
  for (const text of data.settings) table(await unpack(text), at("settings"));
  for (const text of data.tables) table(await unpack(text), at("tables"));
  document.body.dataset.ready = "yes";
})();
