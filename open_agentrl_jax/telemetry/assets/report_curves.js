// Curves: one panel a question, every run of the page in it, one step range for all.

const PANELS = [
  ["Accuracy", ["rl accuracy/mean", "eval accuracy/mean"]],
  ["Reward", ["rl reward/mean", "rl reward/std", "eval reward/mean"]],
  ["Entropy (nats)", ["rl actor/entropy"]],
  ["Clip share", ["rl actor/pg_clipfrac", "rl actor/pg_clipfrac_lower"]],
  ["Policy: KL to the sampler", ["rl actor/ppo_kl"]],
  ["Gradient norm", ["rl actor/grad_norm"]],
  ["Response length (tokens)", ["rl response_length/mean", "rl response_length/max", "rl response_length/min"]],
  ["Tool calls a response", ["rl tool_calls/mean", "rl tool_calls/none"]],
  ["Tool calls that succeed", ["rl tool_success/mean", "eval tool_success/mean"]],
  ["Cut off at the length limit", ["rl response_length/clip_ratio"]],
  ["Staleness (weight versions)", ["rl staleness/mean", "rl staleness/max"]],
  ["Groups without a lesson", ["rl groups/equal"]],
  ["Time of a step (s)", "time"],
  ["Tokens a second", ["rl tokens_per_second"]],
  ["SFT loss", ["sft loss"]],
  ["SFT gradient norm", ["sft actor/grad_norm"]],
];
const COLOURS = ["#3b7dd8", "#d1603d", "#2f9e6e", "#9459c7", "#b98b1d", "#cf4f8b", "#4aa3b5", "#7a7a7a"];
const TIMES_APART = new Set(["time/step", "time/episode_mean", "time/episode_max"]); // not parts of the step's time

// What the vertical axis shows: uPlot's own choice is 0 to 100 where all is 0.
function room(_, low, high) {
  return low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low ?? 0, high ?? 1, 0.1, true);
}

class Curves {
  constructor(runs, onRange) {
    this.runs = runs;
    this.onRange = onRange;
    this.plots = []; // {plot, box, sft}
    this.range = null; // [low, high] steps of RL; null: all
    this.element = el("section", { class: "curves" });
    this.low = el("input", { type: "number", "aria-label": "first step", class: "short" });
    this.high = el("input", { type: "number", "aria-label": "last step", class: "short" });
    for (const input of [this.low, this.high]) input.addEventListener("change", () => this.typed());
    this.filter = el("input", { type: "search", placeholder: "any metric: packing", "aria-label": "metric filter" });
    this.filter.addEventListener("input", () => this.draw());
    const all = el("button", { onclick: () => this.zoom(null) }, "all steps");
    const hint = "drag over a curve for a range of steps, double-click for all";
    const bar = el("p", { class: "bar" }, "steps ", this.low, " to ", this.high, all, this.filter, el("span", { class: "note" }, hint));
    this.grid = el("div", { class: "grid" });
    this.element.append(bar, this.grid);
  }

  // Every "phase name" that any run has numbers of.
  names() {
    const names = new Set();
    for (const run of this.runs)
      for (const [phase, columns] of Object.entries(run.head.metrics))
        for (const [name, values] of Object.entries(columns))
          if (name !== "step" && values.some((value) => typeof value === "number")) names.add(`${phase} ${name}`);
    return names;
  }

  draw() {
    for (const { plot } of this.plots) plot.destroy();
    this.plots = [];
    const names = this.names();
    const wanted = this.filter.value.trim().toLowerCase();
    const panels = wanted ? [...names].filter((name) => name.toLowerCase().includes(wanted)).map((name) => [name, [name]]) : PANELS;
    this.grid.replaceChildren();
    for (const [title, series] of panels.slice(0, 40)) {
      if (series === "time") this.runs.forEach((run) => this.times(title, run));
      else this.panel(title, series.filter((name) => names.has(name)));
    }
    if (!this.plots.length) this.grid.append(el("p", { class: "note" }, wanted ? "no metric has that in its name" : "no metrics yet"));
    if (this.range) this.zoom(this.range);
  }

  columns(run, name) {
    const [phase, key] = name.split(/ (.*)/);
    const columns = run.head.metrics[phase];
    return columns && columns[key] ? { steps: columns.step, values: columns[key] } : null;
  }

  panel(title, names) {
    const lines = [];
    this.runs.forEach((run, r) =>
      names.forEach((name, n) => {
        const columns = this.columns(run, name);
        if (columns) lines.push({ ...columns, colour: COLOURS[n % COLOURS.length], dash: r ? [5, 4] : undefined, points: name.startsWith("eval"), label: this.runs.length > 1 ? `${run.name}: ${name}` : name });
      }),
    );
    if (!lines.length) return;
    const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, i) => [step, i]));
    const data = [steps];
    const series = [{ label: "step" }];
    for (const line of lines) {
      const values = Array(steps.length).fill(null);
      line.steps.forEach((step, i) => (values[place.get(step)] = line.values[i]));
      data.push(values);
      series.push({ label: line.label, stroke: line.colour, width: 1.5, dash: line.dash, spanGaps: true, points: { show: line.points, size: 6 }, value: (_, value) => figure(value) });
    }
    this.add(title, data, series, names.every((name) => name.startsWith("sft")));
  }

  // Parts of a step's time, stacked: the first area reaches up to the sum of all.
  times(title, run) {
    const columns = run.head.metrics.rl;
    if (!columns) return;
    const parts = Object.keys(columns).filter((name) => name.startsWith("time/") && !TIMES_APART.has(name));
    if (!parts.length) return;
    const sums = parts.map((_, n) => columns.step.map((_, i) => parts.slice(n).reduce((sum, name) => sum + (columns[name][i] ?? 0), 0)));
    const series = parts.map((name, n) => ({
      label: name.slice(5),
      stroke: COLOURS[n % COLOURS.length],
      fill: COLOURS[n % COLOURS.length],
      width: 1,
      points: { show: false },
      value: (_, value, s, i) => figure(i === null || i === undefined ? null : columns[parts[s - 1]][i]),
    }));
    this.add(this.runs.length > 1 ? `${title}, ${run.name}` : title, [columns.step, ...sums], [{ label: "step" }, ...series], false);
  }

  add(title, data, series, sft) {
    const box = el("figure", { class: "panel" }, el("figcaption", {}, title));
    this.grid.append(box);
    const ink = getComputedStyle(document.body);
    const axis = { stroke: ink.getPropertyValue("--ink"), grid: { stroke: ink.getPropertyValue("--line"), width: 1 }, ticks: { show: false } };
    const options = {
      width: Math.max(260, box.clientWidth - 16),
      height: 190,
      scales: { x: { time: false }, y: { range: room } },
      axes: [
        { ...axis, size: 26 },
        { ...axis, size: 52, values: (_, ticks) => marks(ticks) },
      ],
      series,
      legend: { markers: { dash: (_, i) => (series[i].dash ? "dotted" : "solid") } },
      cursor: { sync: { key: sft ? "sft" : "rl" }, drag: { x: true, y: false } },
      hooks: { setScale: [(plot, key) => key === "x" && !sft && this.moved(plot)] },
    };
    const plot = new uPlot(options, data, box);
    this.plots.push({ plot, box, sft });
  }

  moved(plot) {
    if (this.moving || !this.plots.some((one) => one.plot === plot)) return;
    const { min, max } = plot.scales.x;
    const steps = plot.data[0];
    const whole = min <= steps[0] && max >= steps[steps.length - 1];
    this.zoom(whole ? null : [Math.ceil(min), Math.floor(max)], whole ? null : [min, max]);
  }

  typed() {
    const [low, high] = [this.low.value, this.high.value];
    this.zoom(low === "" && high === "" ? null : [low === "" ? 0 : Number(low), high === "" ? Infinity : Number(high)]);
  }

  zoom(range, exact = range) {
    this.moving = true;
    this.range = range;
    for (const { plot, sft } of this.plots) {
      const steps = plot.data[0];
      if (sft) continue;
      const [min, max] = exact ?? [steps[0], steps[steps.length - 1]];
      plot.setScale("x", { min, max: Math.min(max, steps[steps.length - 1]) });
    }
    this.low.value = range ? range[0] : "";
    this.high.value = range && range[1] !== Infinity ? range[1] : "";
    queueMicrotask(() => (this.moving = false)); // uPlot commits its scales in a microtask, queued before this one
    this.onRange(range);
  }

  resize() {
    for (const { plot, box } of this.plots) plot.setSize({ width: Math.max(260, box.clientWidth - 16), height: 190 });
  }
}
