// One trajectory as a chat, its tokens on demand, and several side by side.

const CALL = /<tool_call>([\s\S]*?)(?:<\/tool_call>|(?=<tool_call>)|$)/g;
const TOKENS_A_FRAME = 1500;

// An assistant's text as pieces: {words}, {thought} or {call, name, code}.
function pieces(text) {
  const made = [];
  const end = text.lastIndexOf("</think>");
  if (end >= 0) made.push({ thought: text.slice(0, end).replace(/^\s*<think>/, "").trim() });
  const spoken = end >= 0 ? text.slice(end + 8) : text;
  let last = 0;
  for (const match of spoken.matchAll(CALL)) {
    made.push({ words: spoken.slice(last, match.index) });
    made.push(callPiece(match[1]));
    last = match.index + match[0].length;
  }
  made.push({ words: spoken.slice(last) });
  return made.filter((piece) => piece.call || piece.thought || (piece.words && piece.words.trim()));
}

function callPiece(body) {
  try {
    const call = JSON.parse(body);
    const keys = Object.keys(call.arguments);
    const code = keys.length === 1 && typeof call.arguments[keys[0]] === "string" ? call.arguments[keys[0]] : JSON.stringify(call.arguments, null, 1);
    return { call: true, name: String(call.name), code };
  } catch {
    return { call: true, name: "a call that cannot be read", code: body.trim(), broken: true };
  }
}

function bubble(message, differs) {
  const body = el("div", { class: "body" });
  const text = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "");
  if (message.role === "assistant") {
    for (const piece of pieces(text)) {
      if (piece.thought) body.append(el("details", {}, el("summary", {}, "thinking"), el("p", {}, piece.thought)));
      else if (piece.call) body.append(el("div", { class: "call" + (piece.broken ? " broken" : "") }, el("small", {}, piece.name), el("pre", { class: "code" }, piece.code)));
      else body.append(el("p", {}, piece.words.trim()));
    }
  } else body.append(message.role === "tool" ? el("pre", { class: "output" }, text) : el("p", {}, text));
  return el("div", { class: `message ${message.role.replace(/\W/g, "")}${differs ? " differs" : ""}` }, el("small", { class: "role" }, differs ? `${message.role} · differs from here on` : message.role), body);
}

function facts(trajectory) {
  const metrics = trajectory.metrics ?? {};
  const rows = [
    ["problem", trajectory.problem_id],
    ["step", `${trajectory.phase ?? ""} ${trajectory.step}, sample ${trajectory.sample ?? 0}`],
    ["reward", figure(trajectory.reward)],
    ["accuracy", figure(trajectory.accuracy)],
    ["stop", trajectory.stop],
    ["expected answer", trajectory.answer],
    ["weight versions", (trajectory.versions ?? []).join(", ")],
    ...Object.entries(metrics).map(([name, value]) => [name, figure(value)]),
  ];
  const shown = rows.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return el("dl", { class: "facts" }, ...shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

// The prompt with the chat template applied, system prompt included, and the tool schemas: what the model saw.
function seen(run, trajectory) {
  const tools = trajectory.tools ?? [];
  const names = tools.map((tool) => (tool.function ?? tool).name).join(", ");
  const box = el("details", { class: "seen" }, el("summary", {}, `the prompt as the model saw it${names ? `; tools: ${names}` : ""}`));
  const fill = async () => {
    if (trajectory.tokens) {
      const [{ ids, versions }, words] = await Promise.all([tokensOf(trajectory.tokens), run.vocabulary()]);
      const first = versions.findIndex((version) => version >= 0);
      box.append(el("pre", { class: "prompt" }, [...ids.slice(0, first < 0 ? ids.length : first)].map((id) => words[id] ?? `#${id} `).join("")));
    }
    if (tools.length) box.append(el("pre", { class: "code" }, JSON.stringify(tools, null, 1)));
  };
  box.addEventListener("toggle", () => fill().catch((error) => box.append(el("p", { class: "note" }, String(error.message)))), { once: true });
  return box;
}

// The chat of a row; `reference` is the trajectory that the first difference is marked against.
async function chat(run, row, { full = true, reference = null } = {}) {
  const trajectory = await run.row(row);
  const box = el("article", { class: "trajectory" });
  const verdict = /^(aborted|error|client_.*)$/.test(trajectory.stop) ? "aborted" : trajectory.accuracy > 0 ? "right" : "wrong";
  box.append(el("h3", {}, el("span", { class: `verdict ${verdict}` }, verdict), ` ${figure(trajectory.reward)} · ${trajectory.stop} · sample ${trajectory.sample ?? 0}`));
  if (full) box.append(facts(trajectory), seen(run, trajectory));
  const said = [...(full ? (trajectory.prompt ?? []) : []), ...(trajectory.messages ?? [])];
  const compared = reference && reference !== trajectory ? said.findIndex((message, i) => message.content !== ((reference.messages ?? [])[i] ?? {}).content) : -1;
  const talk = el("div", { class: "talk" }, ...said.map((message, i) => bubble(message, i === compared)));
  box.append(talk);
  for (const [i, packed] of [trajectory.tokens, ...(trajectory.more_tokens ?? [])].entries()) {
    if (!packed) continue;
    const place = el("div", { class: "tokens" });
    const button = el("button", {}, `tokens${i ? ` of sequence ${i + 1}` : ""}: log-prob, mask, version`);
    button.addEventListener("click", () => {
      button.remove();
      showTokens(run, packed, place);
    });
    box.append(button, place);
  }
  return box;
}

async function showTokens(run, packed, place) {
  const [{ ids, versions, logprobs }, words] = await Promise.all([tokensOf(packed), run.vocabulary()]);
  const tip = el("p", { class: "tip" }, `${ids.length} tokens; grey: not sampled, so without gradient; red: unlikely. Point at one.`);
  const text = el("div", { class: "stream" });
  place.replaceChildren(tip, text);
  const tell = (event) => {
    const i = event.target.dataset && event.target.dataset.i;
    if (i === undefined) return;
    const sampled = versions[i] >= 0;
    const detail = sampled ? `log-prob ${logprobs[i].toFixed(4)} (p ${Math.exp(logprobs[i]).toFixed(4)}), weight version ${versions[i]}, trained` : "not sampled, masked";
    tip.textContent = `token ${i}: id ${ids[i]} ${JSON.stringify(words[ids[i]] ?? "?")}, ${detail}`;
  };
  text.addEventListener("mouseover", tell);
  text.addEventListener("click", tell);
  let next = 0;
  const more = () => {
    const part = document.createDocumentFragment();
    for (const end = Math.min(next + TOKENS_A_FRAME, ids.length); next < end; next++) {
      const token = el("span", { class: versions[next] >= 0 ? "sampled" : "masked", "data-i": next }, words[ids[next]] ?? `#${ids[next]} `);
      if (versions[next] >= 0) token.style.backgroundColor = `rgb(214 60 45 / ${(0.75 * (1 - Math.exp(logprobs[next]))).toFixed(2)})`;
      part.append(token);
    }
    text.append(part);
    if (next < ids.length) requestAnimationFrame(more);
  };
  more();
}

// Rows of one problem in columns, the wrong ones first, each marked where it leaves the first right one.
async function sideBySide(entries) {
  const loaded = await Promise.all(entries.map(async ({ run, row }) => ({ run, row, trajectory: await run.row(row) })));
  const right = loaded.find(({ trajectory }) => trajectory.accuracy > 0);
  loaded.sort((a, b) => a.trajectory.accuracy - b.trajectory.accuracy);
  const columns = await Promise.all(loaded.map(({ run, row }) => chat(run, row, { full: false, reference: right && right.trajectory })));
  const many = new Set(entries.map(({ run }) => run)).size > 1;
  if (many) columns.forEach((column, i) => column.prepend(el("small", { class: "role" }, loaded[i].run.name)));
  const { trajectory } = loaded[0];
  const count = loaded.filter((one) => one.trajectory.accuracy > 0).length;
  const title = `${trajectory.problem_id}: ${count} of ${loaded.length} right${right && count < loaded.length ? "; the orange line is where a sample first differs from a right one" : ""}`;
  return el("div", {}, el("h3", {}, title), seen(loaded[0].run, trajectory), ...(trajectory.prompt ?? []).map((message) => bubble(message)), el("div", { class: "columns" }, ...columns));
}
