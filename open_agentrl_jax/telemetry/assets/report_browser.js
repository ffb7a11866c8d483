// The list of trajectories or groups: only the rows in view are in the document, and only their index is needed.

const ROW = 26; // pixels
const SHOW = { trajectories: "trajectories", groups: "groups", mixed: "groups, some right and some wrong" };
const ORDERS = {
  run: ["as they were played", null],
  worst: ["lowest reward first", (a, b) => a.reward - b.reward],
  best: ["highest reward first", (a, b) => b.reward - a.reward],
  longest: ["longest first", (a, b) => b.length - a.length],
  calls: ["most calls first", (a, b) => b.calls - a.calls],
};

class Browser {
  constructor(runs) {
    this.runs = runs;
    this.run = runs[0];
    this.inputs = {};
    const choice = (name, options) => {
      const select = el("select", { "aria-label": name }, ...Object.entries(options).map(([value, text]) => el("option", { value }, text)));
      select.addEventListener("change", () => this.apply());
      return (this.inputs[name] = select);
    };
    const box = (name, placeholder, type = "number") => {
      const input = el("input", { type, placeholder, "aria-label": name, class: type === "number" ? "short" : "", step: "any" });
      input.addEventListener("input", () => this.apply());
      return (this.inputs[name] = input);
    };
    const which = choice("run", Object.fromEntries(runs.map((run, i) => [i, run.name])));
    if (runs.length < 2) which.hidden = true;
    const bar = el("p", { class: "bar" }, which, choice("show", SHOW), choice("phase", {}), " steps ", box("step from", "from"), box("step to", "to"), box("problem", "problem", "search"), " reward ", box("reward from", "from"), box("reward to", "to"), choice("stop", {}), " calls ", box("calls from", "from"), box("calls to", "to"), choice("order", Object.fromEntries(Object.entries(ORDERS).map(([k, v]) => [k, v[0]]))));
    this.count = el("p", { class: "note" });
    this.space = el("div", { class: "space" });
    this.list = el("div", { class: "list", tabindex: "0", role: "listbox", "aria-label": "trajectories" }, this.space);
    this.list.addEventListener("scroll", () => this.paint());
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.detail = el("div", { class: "detail" }, el("p", { class: "note" }, "Choose a row."));
    this.element = el("section", { class: "browser" }, bar, this.count, el("div", { class: "split" }, this.list, this.detail));
    this.choose();
  }

  choose() {
    this.run = this.runs[Number(this.inputs.run.value) || 0];
    for (const name of ["phase", "stop"]) {
      const select = this.inputs[name];
      const kept = select.value;
      const values = [...new Set(this.run.index[name])].sort();
      select.replaceChildren(el("option", { value: "" }, `any ${name}`), ...values.map((value) => el("option", { value }, value)));
      select.value = values.includes(kept) ? kept : "";
    }
    this.chosen = this.run;
    this.apply();
  }

  steps(range) {
    this.inputs["step from"].value = range ? range[0] : "";
    this.inputs["step to"].value = range && range[1] !== Infinity ? range[1] : "";
    this.apply();
  }

  bound(name, otherwise) {
    const { value } = this.inputs[name];
    return value === "" ? otherwise : Number(value);
  }

  apply() {
    if (this.chosen !== this.runs[Number(this.inputs.run.value) || 0]) return this.choose();
    const { index, groups } = this.run;
    const show = this.inputs.show.value;
    const phase = this.inputs.phase.value;
    const stop = this.inputs.stop.value;
    const problem = this.inputs.problem.value.toLowerCase();
    const bounds = ["step", "reward", "calls"].map((name) => [index[name], this.bound(`${name} from`, -Infinity), this.bound(`${name} to`, Infinity)]);
    const passes = (i) =>
      (!phase || index.phase[i] === phase) &&
      (!stop || index.stop[i] === stop) &&
      (!problem || index.problem[i].toLowerCase().includes(problem)) &&
      bounds.every(([column, low, high]) => column[i] >= low && column[i] <= high);
    const items = [];
    if (show === "trajectories") {
      for (let i = 0; i < index.step.length; i++) if (passes(i)) items.push([i, i + 1]);
    } else {
      for (const [first, end] of groups) {
        let some = false;
        let right = 0;
        for (let i = first; i < end; i++) {
          some ||= passes(i);
          right += index.accuracy[i] > 0;
        }
        if (some && (show === "groups" || (right && right < end - first))) items.push([first, end]);
      }
    }
    const mean = (column, [first, end]) => {
      let sum = 0;
      for (let i = first; i < end; i++) sum += column[i];
      return sum / (end - first);
    };
    this.items = items.map((item) => ({
      rows: item,
      reward: mean(index.reward, item),
      accuracy: mean(index.accuracy, item),
      length: mean(index.length, item),
      calls: mean(index.calls, item),
      good: mean(index.good, item),
    }));
    const order = ORDERS[this.inputs.order.value][1];
    if (order) this.items.sort(order);
    const left = this.run.head.left_out ? `; ${this.run.head.left_out} more are in trajectories.jsonl only (see them with --serve)` : "";
    const damaged = this.run.head.damaged ? `; ${this.run.head.damaged} damaged lines are skipped` : "";
    this.count.textContent = `${this.items.length} ${show === "trajectories" ? "trajectories" : "groups"} of ${show === "trajectories" ? index.step.length : groups.length}${left}${damaged}`;
    this.space.style.height = `${this.items.length * ROW}px`;
    this.selected = -1;
    this.list.scrollTop = 0;
    this.paint();
  }

  paint() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 8);
    const end = Math.min(this.items.length, first + Math.ceil((this.list.clientHeight || 600) / ROW) + 16);
    const rows = [];
    for (let i = first; i < end; i++) rows.push(this.line(i));
    this.space.replaceChildren(...rows);
  }

  line(i) {
    const item = this.items[i];
    const { index } = this.run;
    const [row, end] = item.rows;
    const single = end - row === 1;
    const verdict = single && /^(aborted|error|client_.*)$/.test(index.stop[row]) ? "aborted" : item.accuracy >= 1 ? "right" : item.accuracy > 0 ? "part" : "wrong";
    const cells = [
      [`verdict ${verdict}`, single ? (verdict === "right" ? "✓" : verdict === "aborted" ? "–" : "✗") : `${Math.round(item.accuracy * (end - row))}/${end - row}`],
      ["cell", `${index.phase[row]} ${index.step[row]}`],
      ["cell wide", index.problem[row]],
      ["cell", figure(item.reward, 2)],
      ["cell", `${figure(item.length, 0)} tokens`],
      ["cell", `${figure(item.good, 1)}/${figure(item.calls, 1)} ok`],
      ["cell", single ? index.stop[row] : ""],
    ];
    const line = el("div", { class: `line${i === this.selected ? " selected" : ""}`, role: "option", onclick: () => this.open(i) }, ...cells.map(([name, text]) => el("span", { class: name }, text)));
    line.style.top = `${i * ROW}px`;
    return line;
  }

  key(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move || !this.items.length) return;
    event.preventDefault();
    const next = Math.min(this.items.length - 1, Math.max(0, this.selected + move));
    const top = next * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    this.open(next);
  }

  async open(i) {
    this.selected = i;
    this.paint();
    const { run } = this;
    const [row, end] = this.items[i].rows;
    try {
      const shown = end - row > 1 ? await this.group(run, row, end) : await this.one(run, row);
      if (this.selected === i && this.run === run) this.detail.replaceChildren(shown);
    } catch (error) {
      this.detail.replaceChildren(el("p", { class: "note" }, `cannot be shown: ${error.message}`));
    }
    this.detail.scrollTop = 0;
  }

  async one(run, row) {
    const shown = await chat(run, row);
    const [first, end] = run.groups.find(([a, b]) => a <= row && row < b);
    if (end - first > 1) {
      const button = el("button", { onclick: async () => this.detail.replaceChildren(await this.group(run, first, end)) }, `its group of ${end - first}, side by side`);
      shown.querySelector("h3").after(button);
    }
    return shown;
  }

  group(run, first, end) {
    return sideBySide([...Array(end - first).keys()].map((i) => ({ run, row: first + i })));
  }
}
