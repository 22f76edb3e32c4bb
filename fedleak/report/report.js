// The page's own script; Vega-Embed comes before it, in the same module.
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const json = (id) => JSON.parse(byId(id).textContent);
const charts = json("charts-data");
const narrow = matchMedia("(max-width: 620px)");

// Light and dark: the system's choice, until the button is pressed.
const dark = matchMedia("(prefers-color-scheme: dark)");
const button = byId("theme");
function setTheme(name) {
  root.dataset.theme = name;
  button.textContent = name === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${name === "dark" ? "light" : "dark"} theme`);
  drawCharts();
}
button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));

function drawCharts() {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const font = "system-ui, 'Segoe UI', Roboto, sans-serif";
  const axis = {
    labelColor: color("faint"), titleColor: color("faint"), gridColor: color("line"), domainColor: color("line"),
    tickColor: color("line"), labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500,
  };
  const config = {
    background: "transparent", font, axis, view: { stroke: null },
    legend: { labelColor: color("ink"), titleColor: color("faint"), labelFont: font, titleFont: font, labelFontSize: 12,
      columns: narrow.matches ? 1 : 3 },
    mark: { color: color("s1") }, text: { font },
    bar: { color: color("s1") }, line: { color: color("s1") }, point: { color: color("s1") },
    range: {
      category: [1, 2, 3, 4, 5, 6, 7, 8].map((i) => color(`s${i}`)),
      heatmap: [color("heat0"), color("heat1")], ramp: [color("heat0"), color("heat1")],
    },
  };
  for (const node of document.querySelectorAll("[data-chart]")) {
    const text = JSON.stringify(charts[node.dataset.chart]).replace(/"@(\w+)"/g, (_, name) => JSON.stringify(color(name)));
    const spec = { width: "container", height: 240, autosize: { type: "fit-x", contains: "padding" }, ...JSON.parse(text) };
    // The figure already speaks for itself, in a sentence and a table; a thousand marks read aloud would not help.
    window.vegaEmbed(node, spec, {
      mode: "vega-lite", actions: false, renderer: "svg", config,
      tooltip: { theme: root.dataset.theme },
    }).catch((error) => { node.textContent = `This chart could not be drawn: ${error.message}`; console.error(error); });
  }
}

// The gallery: a page of cards at a time, however many images there are.
const PAGE = narrow.matches ? 24 : 48;
const gallery = byId("filters") ? json("gallery-data") : null;
const form = byId("filters");
let page = 0;

const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

const urls = new Map();
function sheetUrl(sheet) {
  if (!urls.has(sheet)) {
    const bytes = Uint8Array.from(atob(byId(`sheet-${sheet}`).textContent), (c) => c.charCodeAt(0));
    urls.set(sheet, URL.createObjectURL(new Blob([bytes], { type: "image/webp" })));
  }
  return urls.get(sheet);
}

function thumbnail(place, alt, missing) {
  const box = element("span", "thumb", place < 0 ? missing : undefined);
  if (place < 0) return box;
  const [sheet, x, y, width, height] = gallery.places[place];
  const side = narrow.matches ? 66 : 78;
  const scale = side / Math.max(width, height);
  const [sheetWidth, sheetHeight] = gallery.sheets[sheet];
  const image = element("i");
  image.setAttribute("role", "img");
  image.setAttribute("aria-label", alt);
  Object.assign(image.style, {
    width: `${width * scale}px`, height: `${height * scale}px`,
    backgroundImage: `url(${sheetUrl(sheet)})`,
    backgroundPosition: `${-x * scale}px ${-y * scale}px`,
    backgroundSize: `${sheetWidth * scale}px ${sheetHeight * scale}px`,
  });
  box.append(image);
  return box;
}

const short = (mse) =>
  mse === 0 ? "0" : mse >= 0.01 ? String(Number(mse.toPrecision(2))) : mse.toExponential(1);

const decibels = (mse) => (mse === 0 ? "exact" : `${(-10 * Math.log10(mse)).toFixed(1)} dB`);
const closeness = (mse) => (mse === null ? "not rebuilt" : `${decibels(mse)}, MSE ${short(mse)}`);

const where = ([run, round, client, image]) =>
  `${gallery.runs.length > 1 ? `${gallery.runs[run]}, ` : ""}round ${round}, client ${client}, image ${image}`;

function card(entry) {
  const [run, round, client, image, labelTrue, labelInferred, mse, recovered, truePlace, rebuiltPlace, film,
    limit = null, expected = null] = entry;
  const item = element("li", recovered ? "card recovered" : "card");
  if (gallery.runs.length > 1) item.append(element("div", "where", gallery.runs[run]));
  item.append(element("div", "where", `round ${round}, client ${client}, image ${image}`));
  const known = labelTrue !== null;
  const pair = element("div", "pair");
  if (known || truePlace >= 0) pair.append(thumbnail(truePlace, `private image, label ${labelTrue}`, "no private image"));
  const inferred = labelInferred === null ? "none" : String(labelInferred);
  const how = recovered === null ? "" : `, ${closeness(mse)}, ${recovered ? "recovered" : "not recovered"}`;
  if (gallery.rebuilt) pair.append(thumbnail(rebuiltPlace, `rebuilt image, inferred label ${inferred}${how}`, "not rebuilt"));
  item.append(pair);
  const label = element("div", "score");
  if (known) {
    const text = element("span", undefined, `label ${labelTrue} → `);
    text.append(element("span", labelTrue === labelInferred ? "" : "wrong", inferred));
    label.append(text);
  } else {
    label.append(element("span", undefined, `inferred label ${inferred}`));
  }
  if (recovered) label.append(element("span", "chip", "recovered"));
  item.append(label);
  if (mse !== null) item.append(element("div", undefined, limit === null ? closeness(mse) : decibels(mse)));
  if (limit !== null) {
    const beside = element("div", "beside");
    if (mse !== null) beside.append(element("span", undefined, `reached ${short(mse)} ·`), " ");
    beside.append(element("span", undefined, `possible ${short(limit)}`));
    item.append(beside);
  }
  if (expected !== null) item.append(element("div", "where", `the attacker expected ${short(expected)}`));
  if (film.length) {
    const open = element("button", "evolve", "Evolution");
    open.type = "button";
    open.setAttribute("aria-label", `Evolution of ${where(entry)}`);
    open.addEventListener("click", () => showFilm(entry));
    item.append(open);
  }
  return item;
}

// How one image came about, frame by frame, the private one before them.
let filmed = null;
function showFilm(entry) {
  filmed = entry;
  const [labelTrue, truePlace, film] = [entry[4], entry[8], entry[10]];
  const frames = film.map(([evaluations, mse, place], i) => {
    const found = mse !== null && mse < gallery.threshold;
    const frame = element("li", found ? "recovered" : "");
    const when = i === 0 ? "start" : `${evaluations.toLocaleString("en")} evaluations`;
    frame.append(thumbnail(place, `${i === film.length - 1 ? "rebuilt image" : "image"}, ${when}`, "not rebuilt"));
    frame.append(element("div", undefined, when));
    if (mse !== null) frame.append(element("div", "error", `MSE ${short(mse)}${found ? " ✓" : ""}`));
    return frame;
  });
  if (labelTrue !== null || truePlace >= 0) {
    const frame = element("li", "true");
    frame.append(thumbnail(truePlace, `private image, label ${labelTrue}`, "no private image"));
    frame.append(element("div", undefined, "private image"));
    frames.unshift(frame);
  }
  byId("film-title").textContent = `How it came about: ${where(entry)}`;
  const passed = film.find(([, mse]) => mse !== null && mse < gallery.threshold);
  byId("film-says").textContent = `The best images so far, from the attack's start to what it returned.`
    + (film[0][1] === null ? "" : passed && !(film[film.length - 1][1] < gallery.threshold)
      ? ` After ${passed[0].toLocaleString("en")} evaluations it was a copy to the eye, but the attack, which cannot see that, went on.`
      : passed ? ` After ${passed[0].toLocaleString("en")} evaluations, at the latest, it was a copy to the eye (✓: MSE below ${gallery.threshold}).`
      : ` It never came to an MSE below ${gallery.threshold}.`);
  byId("frames").replaceChildren(...frames);
  const all = chosen().filter((item) => item[10].length);
  const focused = document.activeElement; // a disabled button would lose the keyboard's place in the dialog
  byId("film-previous").disabled = all[0] === filmed;
  byId("film-next").disabled = all[all.length - 1] === filmed;
  if (focused.disabled) byId("film-close").focus();
  if (!byId("film").open) byId("film").showModal();
}

function turnFilm(by) {
  const all = chosen().filter((item) => item[10].length);
  const next = all[all.indexOf(filmed) + by];
  if (next) showFilm(next);
}

function chosen() {
  const want = Object.fromEntries(new FormData(form));
  const fields = { run: 0, round: 1, client: 2, recovered: 7 };
  let items = gallery.items.filter((item) =>
    Object.entries(fields).every(([name, at]) => !want[name] || String(item[at]) === want[name]));
  if (want.label) items = items.filter((item) => item[4] !== null && String(Number(item[4] === item[5])) === want.label);
  if (want.film) items = items.filter((item) => item[10].length);
  if (want.order) {
    const sign = want.order === "closest" ? 1 : -1;
    const error = (item) => (item[6] === null ? Infinity : item[6]);
    items = [...items].sort((a, b) => sign * (Math.min(error(a), 1e30) - Math.min(error(b), 1e30)));
  }
  return items;
}

function drawGallery() {
  const items = chosen();
  const pages = Math.max(1, Math.ceil(items.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  const first = page * PAGE;
  const shown = items.slice(first, first + PAGE);
  byId("cards").replaceChildren(...shown.map(card));
  byId("status").textContent = items.length
    ? `Images ${first + 1} to ${first + shown.length} of ${items.length.toLocaleString("en")}`
      + (items.length < gallery.items.length ? ` chosen, ${gallery.items.length.toLocaleString("en")} in all` : "")
    : "No image is like that.";
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
}

setTheme(dark.matches ? "dark" : "light");
if (gallery) {
  form.addEventListener("change", () => { page = 0; drawGallery(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  const turn = (by) => { page += by; drawGallery(); byId("gallery").scrollIntoView(); };
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("film-previous").addEventListener("click", () => turnFilm(-1));
  byId("film-next").addEventListener("click", () => turnFilm(1));
  byId("film").addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft" || key === "ArrowRight") turnFilm(key === "ArrowLeft" ? -1 : 1);
  });
  drawGallery();
}
