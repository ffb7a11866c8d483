"use strict";
// Where the page's numbers and texts come from: script elements of this file, or the server it was loaded from.

const EMBEDDED = Number(document.body.dataset.runs);
const KEPT_CHUNKS = 24; // unpacked at once; a chunk is some 256 KB of text

async function unpack(bytes, format) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function partText(run, name) {
  if (EMBEDDED) {
    const element = document.getElementById(`${run}:${name}`);
    return new TextDecoder().decode(await unpack(fromBase64(element.textContent), "gzip"));
  }
  const answer = await fetch(`data/${encodeURIComponent(run)}/${name}`);
  if (!answer.ok) throw new Error(`${run}/${name}: ${await answer.text()}`);
  return answer.text();
}

class Run {
  constructor(key) {
    this.key = key;
    this.cache = new Map(); // chunk number -> promise of its parsed lines, the one used last at the end
  }

  async load() {
    this.head = JSON.parse(await partText(this.key, "head"));
    this.name = this.head.name;
    this.index = JSON.parse(await partText(this.key, "index"));
    this.groups = groupsOf(this.index, this.index.step.length);
    return this;
  }

  // The trajectory of a row, with all its text.
  async row(row) {
    const firsts = this.head.chunks;
    let low = 0;
    let high = firsts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (firsts[middle] <= row) low = middle;
      else high = middle;
    }
    let lines = this.cache.get(low);
    this.cache.delete(low);
    lines ??= partText(this.key, `chunk${low}`).then((text) => text.split("\n").filter(Boolean).map((line) => JSON.parse(line)));
    this.cache.set(low, lines);
    if (this.cache.size > KEPT_CHUNKS) this.cache.delete(this.cache.keys().next().value);
    return (await lines)[row - firsts[low]];
  }

  // Token id -> text.
  vocabulary() {
    this.words ??= partText(this.key, "vocabulary").then((text) => JSON.parse(text));
    return this.words;
  }
}

// [first, end) of neighbouring rows of one phase, step and problem whose sample numbers rise.
function groupsOf(index, rows) {
  const groups = [];
  for (let i = 0; i < rows; i++) {
    const goes_on =
      i > 0 &&
      ["phase", "step", "problem"].every((name) => index[name][i] === index[name][i - 1]) &&
      index.sample[i] > index.sample[i - 1];
    if (goes_on) groups[groups.length - 1][1] = i + 1;
    else groups.push([i, i + 1]);
  }
  return groups;
}

async function runNames() {
  if (EMBEDDED) return [...Array(EMBEDDED).keys()].map(String);
  return JSON.parse(await (await fetch("data")).text());
}

// The token streams of a line: ids, versions (-1: not sampled) and log-probs (0 there); see telemetry/tokens.py.
async function tokensOf(packed) {
  const read = async (text) => (await unpack(fromBase64(text), "deflate")).buffer;
  const ids = new Uint32Array(await read(packed.ids));
  const halves = new Uint16Array(await read(packed.logprobs));
  const versions = new Int32Array(ids.length);
  const logprobs = new Float32Array(ids.length);
  let place = 0;
  let sampled = 0;
  for (const [count, version] of packed.spans) {
    versions.fill(version, place, place + count);
    if (version >= 0) for (let i = 0; i < count; i++) logprobs[place + i] = half(halves[sampled++]);
    place += count;
  }
  return { ids, versions, logprobs };
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
}

// The only maker of elements: text becomes text nodes, never markup.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : digits);
}

// What stands at an axis: as many digits as tell neighbours apart.
function marks(ticks) {
  const apart = Math.abs(ticks.length > 1 ? ticks[1] - ticks[0] : ticks[0]);
  let digits = 0;
  const whole = (x) => Math.abs(x - Math.round(x)) <= 1e-6 * x;
  while (digits < 5 && !whole(apart * 10 ** digits)) digits++;
  const large = Math.max(...ticks.map(Math.abs)) >= 1e6;
  return ticks.map((tick) => (digits > 4 || large ? (tick ? tick.toExponential(1) : "0") : tick.toFixed(digits)));
}
