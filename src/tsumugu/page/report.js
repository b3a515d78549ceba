"use strict";
// Draws the curves of the page, and switches language, theme, axes and range. What is chosen stands in the address,
// so that a view can be passed on: report.html#lang=ja&theme=dark&x=tokens&log=loss

const JA = {
  "x axis": "横軸", steps: "ステップ", tokens: "トークン", hours: "時間", smoothing: "平滑化", "whole range": "全範囲に戻す",
  auto: "自動", light: "ライト", dark: "ダーク", step: "ステップ",
  // curves
  Loss: "損失", "Validation loss by store": "ストア別の検証損失", "Validation bits per byte": "検証データの bits per byte",
  "Learning rate": "学習率", "Gradient norm": "勾配ノルム", "Tokens per second": "トークン/秒", MFU: "MFU",
  "TFLOPS per device": "デバイスあたり TFLOPS", "Peak memory, GiB": "最大メモリ (GiB)", "Seconds a step": "1 ステップの秒数",
  "Tokens seen by store": "ストア別の既読トークン", "Norms of gradients by part": "部分別の勾配ノルム",
  "Norms of parameters by part": "部分別のパラメータノルム", training: "学習", validation: "検証", "whole step": "ステップ全体",
  "reading data": "データ読み込み", "not finite": "有限でない値", log: "対数", whole: "全体",
  // summary
  Runs: "実行", Run: "実行", Steps: "ステップ", "Last loss": "最終の損失", "Best validation loss": "最良の検証損失",
  "Best bits per byte": "最良の bits per byte", "Tokens seen": "既読トークン", "Time of steps": "ステップの合計時間",
  "Tokens per second, median": "トークン/秒（中央値）", "MFU, median": "MFU（中央値）", "Peak memory": "最大メモリ",
  Parameters: "パラメータ数", Devices: "デバイス",
  // data
  Data: "データ", Store: "ストア", Tokens: "トークン", Documents: "文書", "Tokens seen / tokens": "既読トークン ÷ トークン",
  "Planned share": "予定の割合", "Seen share": "実際の割合", "Planned, seen": "予定・実際", "Planned epochs": "予定のエポック",
  "Seen epochs": "実際のエポック", "cut by max_epochs": "max_epochs で制限", "Stage from row": "段階の開始行",
  Audit: "監査", "Not audited:": "監査なし:",
  "A sample of the rows; `tsumugu audit` reads all of them.": "一部の行だけを見ています。全体は `tsumugu audit` で確認できます。",
  // an audit's own labels
  train: "学習", rows: "行", "supervised tokens": "教師ありトークン", replies: "応答", "rows without supervision": "教師のない行",
  "unknown tokens": "未知トークン", "shortest row": "最短の行", "median row": "中央の行", "90% row": "90% の行", "99% row": "99% の行", "longest row": "最長の行",
  "Lengths in tokens": "長さ（トークン）", Rows: "行の例", "No finding.": "問題は見つかりませんでした。",
  // the rest
  "Replies by step": "ステップごとの応答", "cut off": "途中で打ち切り", Environment: "環境", "From step": "開始ステップ",
  Started: "開始", Processes: "プロセス", Device: "デバイス", Versions: "バージョン", "Paths taken": "選ばれた経路",
  Checkpoints: "チェックポイント", Step: "ステップ", Size: "大きさ", "Seconds to write": "書き込み秒数",
  "Seconds training waited": "学習の待ち秒数", complete: "完全", "not complete": "不完全",
  Configuration: "設定", "What differs": "異なる項目", "All keys": "すべての項目",
};

const CHARTS = [
  { id: "loss", title: "Loss", series: [["loss", "training"], ["validation_loss", "validation"]] },
  { id: "bits", title: "Validation bits per byte", series: [["validation_bits_per_byte", ""]] },
  { id: "stores", title: "Validation loss by store", pattern: /^validation\/(.+)\/loss$/ },
  { id: "rate", title: "Learning rate", series: [["learning_rate", ""]] },
  { id: "grad", title: "Gradient norm", series: [["grad_norm", ""]] },
  { id: "speed", title: "Tokens per second", series: [["tokens_per_second", ""]], zero: true },
  { id: "mfu", title: "MFU", series: [["mfu", ""]], zero: true, percent: true },
  { id: "tflops", title: "TFLOPS per device", series: [["tflops_per_device", ""]], zero: true },
  { id: "memory", title: "Peak memory, GiB", series: [["memory_peak_gib", ""]], zero: true },
  { id: "seconds", title: "Seconds a step", series: [["step_seconds", "whole step"], ["data_seconds", "reading data"]], zero: true },
  { id: "seen", title: "Tokens seen by store", pattern: /^tokens\/(.+)$/, zero: true },
  { id: "gradients", title: "Norms of gradients by part", pattern: /^grad_norm\/(.+)$/ },
  { id: "parameters", title: "Norms of parameters by part", pattern: /^parameter_norm\/(.+)$/ },
];
const PLAIN = ["learning_rate", "tokens_seen"]; // not to be smoothed
const HEIGHT = 230, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 24;

const { runs } = JSON.parse(document.getElementById("figures").textContent);
const state = { lang: navigator.language.startsWith("ja") ? "ja" : "en", theme: "auto", x: "step", log: new Set(), zoom: null, hidden: new Set(), smooth: 0 };
const errors = [];
addEventListener("error", (event) => errors.push(event.message));

const t = (text) => (state.lang === "ja" && Object.hasOwn(JA, text) ? JA[text] : text);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

// --- numbers ---

function short(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e");
  for (const [least, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    const by = unit === "k" ? 1e3 : least;
    if (size >= least) return Number((value / by).toPrecision(digits)) + unit;
  }
  return String(Number(value.toPrecision(digits)));
}

const shown = (chart, value) => (chart.percent ? short(value * 100) + "%" : short(value));

/** The place of the last of `sorted` that is not above `value`. */
function placeOf(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1; else high = middle;
  }
  return low - 1;
}

function interpolate(from, to, value) {
  const place = Math.min(Math.max(placeOf(from, value), 0), from.length - 2);
  const width = from[place + 1] - from[place];
  return width ? to[place] + ((value - from[place]) / width) * (to[place + 1] - to[place]) : to[place];
}

/** Steps of a run on the axis that is chosen. */
const onAxis = (run, step) => (state.x === "step" ? step : interpolate(run.axes.step, run.axes[state.x], step));

function ticks(low, high, log, number = 5) {
  if (log) {
    const some = [];
    const decades = Math.log10(high / low);
    const factors = decades > 6 ? [1] : decades > 2 ? [1, 3] : decades > 0.8 ? [1, 2, 5] : null;
    if (!factors) return ticks(low, high, false);
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const factor of factors) some.push(factor * 10 ** power);
    const inside = some.filter((value) => value >= low && value <= high);
    return inside.length > 9 ? inside.filter((_, place) => place % Math.ceil(inside.length / 9) === 0) : inside;
  }
  const rough = (high - low) / number, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const some = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-9) + 1e-300; n++) some.push(n * step);
  return some;
}

/** Exponentially weighted means, without the pull of the beginning. */
function smoothed(values, weight) {
  let sum = 0, mass = 0;
  return values.map((value) => {
    sum = weight * sum + value;
    mass = weight * mass + 1;
    return sum / mass;
  });
}

// --- curves ---

/** What a chart shows: for each series its run, key, label, colour and dashes. */
function seriesOf(chart) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  const listed = chart.pattern
    ? keys.filter((key) => chart.pattern.test(key)).map((key) => [key, key.match(chart.pattern)[1]])
    : chart.series;
  const dashes = ["", "5 3", "2 2", "8 3 2 3"];
  return runs.flatMap((run, place) =>
    listed
      .map(([key, label], number) => ({ run, place, key, label, number }))
      .filter(({ key }) => run.series[key])
      .map((one) => ({
        ...one,
        color: `var(--c${(runs.length > 1 ? place : one.number) % 8})`,
        dash: runs.length > 1 ? dashes[one.number % 4] : dashes[Math.floor(one.number / 8) % 4],
        of: run.series[one.key],
        validates: one.key.startsWith("validation"),
      })));
}

class Chart {
  constructor(chart) {
    this.chart = chart;
    this.all = seriesOf(chart);
    this.box = element("div", { class: "chart", id: `chart-${chart.id}` });
    this.heading = element("h2", { "data-t": "" }, chart.title);
    this.legend = element("div", { class: "legend" });
    this.log = element("button", { "data-t": "", "aria-pressed": "false" }, "log");
    this.log.addEventListener("click", () => {
      state.log.has(chart.id) ? state.log.delete(chart.id) : state.log.add(chart.id);
      changed();
    });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.box.append(element("header", {}, this.heading, this.legend, this.log), this.tip);
    this.svg = drawn("svg", { height: HEIGHT, role: "img" }, this.box);
    this.svg.addEventListener("pointermove", (event) => this.move(event));
    this.svg.addEventListener("pointerdown", (event) => this.grab(event));
    this.svg.addEventListener("pointerup", (event) => this.release(event));
    this.svg.addEventListener("pointerleave", () => { this.tip.hidden = true; point(null); });
    this.svg.addEventListener("dblclick", () => { state.zoom = null; changed(); });
  }

  draw() {
    const { chart, svg } = this;
    const logarithmic = state.log.has(chart.id);
    this.width = Math.max(svg.clientWidth || this.box.clientWidth - 28, 200);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    svg.setAttribute("aria-label", t(chart.title));
    this.log.setAttribute("aria-pressed", String(logarithmic));
    this.lines = this.all.filter(({ run }) => !state.hidden.has(run.name)).map((one) => this.line(one, logarithmic));
    this.showLegend();
    const [x0, x1] = state.zoom ?? range(this.lines.flatMap(({ x }) => (x.length ? [x[0], x[x.length - 1]] : [])));
    const values = [];
    for (const line of this.lines)
      line.x.forEach((x, place) => {
        if (x >= x0 && x <= x1) values.push(line.floor[place], line.high[place]);
      });
    const positive = logarithmic ? values.filter((value) => value > 0) : values;
    let [y0, y1] = range(chart.zero && !logarithmic ? [0, ...positive] : positive);
    if (logarithmic && !(y0 > 0)) [y0, y1] = [0.1, 1];
    const up = logarithmic ? Math.log10 : (value) => value;
    const room = (up(y1) - up(y0)) * 0.05 || Math.abs(up(y1)) * 0.05 || 0.5;
    const [bottom, top] = [chart.zero && y0 === 0 ? 0 : up(y0) - room, up(y1) + room];
    this.toX = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (this.width - LEFT - RIGHT);
    this.fromX = (pixels) => x0 + ((pixels - LEFT) / (this.width - LEFT - RIGHT)) * (x1 - x0);
    this.toY = (y) => HEIGHT - BOTTOM - ((up(y) - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    const back = logarithmic ? (value) => 10 ** value : (value) => value;
    for (const y of ticks(back(bottom), back(top), logarithmic)) {
      drawn("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: this.toY(y), y2: this.toY(y) }, svg);
      drawn("text", { x: LEFT - 7, y: this.toY(y) + 4, "text-anchor": "end" }, svg).textContent = shown(chart, y);
    }
    for (const x of ticks(x0, x1, false, this.width / 90))
      drawn("text", { x: this.toX(x), y: HEIGHT - 7, "text-anchor": "middle" }, svg).textContent = short(x);
    const clip = `inside-${chart.id}`;
    const inside = drawn("clipPath", { id: clip }, drawn("defs", {}, svg));
    drawn("rect", { x: LEFT - 5, y: TOP - 6, width: this.width - LEFT - RIGHT + 10, height: HEIGHT - TOP - BOTTOM + 8 }, inside);
    this.plot = drawn("g", { "clip-path": `url(#${clip})` }, svg);
    for (const line of this.lines) this.drawLine(line);
    this.over = drawn("g", {}, svg);
    drawn("rect", { x: LEFT, y: 0, width: this.width - LEFT - RIGHT, height: HEIGHT, fill: "transparent" }, svg);
  }

  line(one, logarithmic) {
    const { of, run, validates, key } = one;
    const keep = of.y.map((_, place) => place).filter((place) => !logarithmic || of.y[place] > 0);
    const pick = (values) => keep.map((place) => values[place]);
    const y = pick(of.y);
    const smooth = state.smooth > 0 && !validates && !PLAIN.includes(key) && y.length > 3;
    const least = logarithmic ? range(y)[0] / 10 : -Infinity; // a band may reach down to 0
    return {
      ...one, y, x: pick(of.x).map((step) => onAxis(run, step)), steps: pick(of.x),
      low: of.lo ? pick(of.lo) : y, high: of.hi ? pick(of.hi) : y,
      floor: of.lo ? pick(of.lo).map((value) => Math.max(value, least)) : y,
      mean: smooth ? smoothed(y, state.smooth) : null,
    };
  }

  drawLine(line) {
    const style = `--c:${line.color}`;
    const path = (values) => values.map((y, place) => `${place ? "L" : "M"}${this.toX(line.x[place]).toFixed(1)} ${this.toY(y).toFixed(1)}`).join("");
    if (line.of.lo) {
      const back = line.floor.map((y, place) => `L${this.toX(line.x[place]).toFixed(1)} ${this.toY(y).toFixed(1)}`).reverse().join("");
      drawn("path", { class: "band", style, d: path(line.high) + back + "Z" }, this.plot);
    }
    const dash = line.dash ? { "stroke-dasharray": line.dash } : {};
    drawn("path", { class: `curve ${line.mean ? "raw" : ""}`, style, d: path(line.y), ...dash }, this.plot);
    if (line.mean) drawn("path", { class: "curve", style, d: path(line.mean), ...dash }, this.plot);
    if (line.x.length <= 60 && (line.validates || line.x.length === 1))
      line.x.forEach((x, place) => drawn("circle", { class: "point", style, cx: this.toX(x), cy: this.toY(line.y[place]), r: 3 }, this.plot));
    for (const step of line.of.marks ?? []) {
      const x = this.toX(onAxis(line.run, step)), y = TOP + 4;
      const mark = drawn("path", { class: "mark", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` }, this.plot);
      drawn("title", {}, mark).textContent = `${t("not finite")}: ${line.key} @ ${step}`;
    }
  }

  showLegend() {
    const several = this.all.length > 1 && (runs.length === 1 || this.all.some(({ number }) => number));
    const entries = several ? this.all.filter(({ place }) => runs.length === 1 || place === this.all[0].place) : [];
    this.legend.replaceChildren(...entries.map(({ label, color, dash }) => {
      const swatch = drawn("svg", { viewBox: "0 0 20 8" }, element("span"));
      const style = `--c:${runs.length > 1 ? "var(--faint)" : color}`;
      drawn("path", { class: "curve", style, d: "M0 4H20", ...(dash ? { "stroke-dasharray": dash } : {}) }, swatch);
      return element("span", {}, swatch, this.chart.pattern ? label : t(label));
    }));
    const missing = this.all.reduce((sum, { of }) => sum + (of.missing ?? 0), 0);
    if (missing) this.legend.append(`× ${t("not finite")} (${missing})`);
  }

  /** Shows the values nearest to a place on the axis; the list of them only where the pointer is. */
  point(x, at) {
    this.over.replaceChildren();
    if (x === null || !this.lines.length) return;
    const pixels = this.toX(x);
    if (pixels < LEFT - 1 || pixels > this.width - RIGHT + 1) return;
    drawn("line", { class: "cross", x1: pixels, x2: pixels, y1: TOP, y2: HEIGHT - BOTTOM }, this.over);
    const rows = [];
    let step = null;
    for (const line of this.lines) {
      let place = placeOf(line.x, x);
      if (place + 1 < line.x.length && (place < 0 || line.x[place + 1] - x < x - line.x[place])) place++;
      if (place < 0) continue;
      step ??= line.steps[place];
      const style = `--c:${line.color}`;
      drawn("circle", { class: "here", style, cx: this.toX(line.x[place]), cy: this.toY(line.y[place]), r: 4 }, this.over);
      const names = [runs.length > 1 ? line.run.name : "", this.chart.pattern ? line.label : t(line.label)].filter(Boolean);
      const spread = line.of.lo ? ` (${shown(this.chart, line.low[place])} … ${shown(this.chart, line.high[place])})` : "";
      const value = shown(this.chart, (line.mean ?? line.y)[place]) + spread + (line.validates ? ` @ ${line.steps[place]}` : "");
      const name = element("span", {}, element("i", { class: "dot", style }), names.join(" "));
      rows.push(element("div", {}, name, element("span", {}, value)));
    }
    if (!at) return;
    const title = element("b", {}, `${t("step")} ${(step ?? 0).toLocaleString("en")}${state.x === "step" ? "" : ` · ${t(state.x)} ${short(x)}`}`);
    this.tip.replaceChildren(title, ...rows.slice(0, 16));
    this.tip.hidden = false;
    const left = this.svg.offsetLeft + pixels + 14;
    this.tip.style.left = `${left + this.tip.offsetWidth > this.box.clientWidth - 4 ? Math.max(4, left - this.tip.offsetWidth - 28) : left}px`;
    this.tip.style.top = `${this.svg.offsetTop + TOP}px`;
  }

  pixels(event) {
    return event.clientX - this.svg.getBoundingClientRect().left;
  }

  move(event) {
    const pixels = this.pixels(event);
    point(this.fromX(pixels), this);
    if (this.from === undefined) return;
    const [a, b] = [Math.min(this.from, pixels), Math.max(this.from, pixels)];
    drawn("rect", { class: "drag", x: a, y: TOP, width: b - a, height: HEIGHT - TOP - BOTTOM }, this.over);
  }

  grab(event) {
    if (event.button === 0 && event.pointerType === "mouse") this.from = this.pixels(event);
  }

  release(event) {
    const from = this.from, to = this.pixels(event);
    this.from = undefined;
    if (from === undefined || Math.abs(to - from) < 6) return;
    state.zoom = [this.fromX(Math.min(from, to)), this.fromX(Math.max(from, to))];
    changed();
  }
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

function point(x, chart) {
  for (const one of charts) one.point(x, one === chart);
}

// --- the page ---

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (["en", "ja"].includes(asked.get("lang"))) state.lang = asked.get("lang");
  if (["auto", "light", "dark"].includes(asked.get("theme"))) state.theme = asked.get("theme");
  if (["step", "tokens", "hours"].includes(asked.get("x"))) state.x = asked.get("x");
  state.log = new Set((asked.get("log") ?? "").split(",").filter(Boolean));
  state.smooth = Math.min(Math.max(Number(asked.get("smooth")) || 0, 0), 0.98);
  const zoom = (asked.get("zoom") ?? "").split("~").map(Number);
  state.zoom = zoom.length === 2 && zoom[0] < zoom[1] ? zoom : null;
}

function writeAddress() {
  const view = new URLSearchParams({ lang: state.lang, theme: state.theme, x: state.x });
  if (state.log.size) view.set("log", [...state.log].join(","));
  if (state.smooth) view.set("smooth", state.smooth);
  if (state.zoom) view.set("zoom", state.zoom.map((value) => Number(value.toPrecision(6))).join("~"));
  history.replaceState(null, "", "#" + view);
}

function changed() {
  writeAddress();
  show();
}

function show() {
  document.documentElement.lang = state.lang;
  document.documentElement.dataset.theme = state.theme;
  for (const one of document.querySelectorAll("[data-t]")) {
    one.dataset.en ??= one.textContent;
    one.textContent = t(one.dataset.en);
  }
  for (const [id, value] of [["lang", state.lang], ["theme", state.theme]])
    for (const button of document.getElementById(id).children) button.setAttribute("aria-pressed", String(button.value === value));
  document.getElementById("axis").value = state.x;
  document.getElementById("smooth").value = state.smooth;
  document.getElementById("unzoom").hidden = !state.zoom;
  for (const button of document.getElementById("runs").children)
    button.setAttribute("aria-pressed", String(!state.hidden.has(button.value)));
  for (const chart of charts) chart.draw();
}

for (const label of document.querySelectorAll(".audit th, .audit h3, .audit > p"))
  if (Object.hasOwn(JA, label.textContent)) label.setAttribute("data-t", "");
for (const id of ["lang", "theme"])
  document.getElementById(id).addEventListener("click", (event) => {
    if (event.target.value) { state[id] = event.target.value; changed(); }
  });
document.getElementById("axis").addEventListener("change", (event) => { state.x = event.target.value; state.zoom = null; changed(); });
document.getElementById("smooth").addEventListener("input", (event) => { state.smooth = Number(event.target.value); changed(); });
document.getElementById("unzoom").addEventListener("click", () => { state.zoom = null; changed(); });
if (runs.length > 1)
  for (const [place, run] of runs.entries()) {
    const button = element("button", { value: run.name }, element("i", { class: "dot", style: `--c:var(--c${place % 8})` }), run.name);
    button.addEventListener("click", () => {
      state.hidden.has(run.name) ? state.hidden.delete(run.name) : state.hidden.add(run.name);
      changed();
    });
    document.getElementById("runs").append(button);
  }

const charts = CHARTS.map((chart) => new Chart(chart)).filter((chart) => chart.all.length);
document.getElementById("charts").append(...charts.map((chart) => chart.box));
readAddress();
show();
addEventListener("hashchange", () => { readAddress(); show(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; show(); } });
document.documentElement.dataset.errors = String(errors.length);
