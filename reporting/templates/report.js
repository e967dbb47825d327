"use strict";
// The page's one script: a grid of all images, filters, and a viewer of one. Text is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const viewer = by("viewer"), stage = by("stage"), grid = by("grid");
const opacity = by("opacity"), swipe = by("swipe");
const filters = ["search", "verdict", "kind", "label", "order"].map(by);
let shown = []; // positions in data.images, in the order of the grid
let open = 0; // place in shown of the image in the viewer
let turns = 0; // how often an image was opened

const verdictOf = (image) => (image.flagged ? "flagged" : "not flagged");
const pictureOf = (image, name) => `${data.folder}/${image.index}_${name}`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---------------------------------------------------------------- the grid

function cardOf(image, position) {
  const card = element("button", "card");
  card.type = "button";
  const thumb = element("img");
  thumb.alt = "";
  thumb.loading = "lazy"; // before src
  thumb.decoding = "async";
  [thumb.height, thumb.width] = image.shape;
  thumb.style.aspectRatio = `${image.shape[1]} / ${image.shape[0]}`;
  thumb.style.height = "auto";
  thumb.src = pictureOf(image, "thumb.jpg");
  const words = element("span", "words"), line = element("span", "line");
  line.append(element("span", "", image.score.toFixed(4)));
  line.append(element("span", image.flagged ? "flagged" : "", verdictOf(image)));
  const label = image.label === "unknown" ? "" : image.label;
  const kind = [label, image.kind].filter((word, place, all) => word && all.indexOf(word) === place).join(": ");
  words.append(line, element("span", "kind", kind || " "), element("span", "kind", `${image.index}  ${image.name}`));
  if (image.remarks) words.append(element("span", "flagged", image.remarks));
  card.append(thumb, words);
  card.addEventListener("click", () => show(shown.indexOf(position)));
  const item = element("li");
  item.append(card);
  return item;
}

const items = data.images.map(cardOf);
const texts = data.images.map((image) =>
  [image.index, image.name, image.kind, image.label, image.remarks].join(" ").toLowerCase());

function fill(select, values) {
  for (const value of [...new Set(values)].sort()) {
    const option = element("option", "", value === "" ? "(no kind)" : value);
    option.value = `=${value}`; // so that an empty kind is not "all"
    select.append(option);
  }
}

function filter() {
  const words = by("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [verdict, kind, label, order] = filters.slice(1).map((each) => each.value);
  const passes = (image, position) =>
    (!verdict || verdictOf(image) === verdict) &&
    (!kind || `=${image.kind}` === kind) &&
    (!label || `=${image.label}` === label) &&
    words.every((word) => texts[position].includes(word));
  shown = data.images.map((_, position) => position).filter((position) => passes(data.images[position], position));
  if (order !== "index") {
    const sign = order === "highest" ? -1 : 1;
    shown.sort((a, b) => sign * (data.images[a].score - data.images[b].score) || a - b);
  }
  grid.replaceChildren(...shown.map((position) => items[position]));
  by("count").textContent = `${shown.length} of ${data.images.length} images`;
}

// ---------------------------------------------------------------- the viewer

function facts(image) {
  const told = [
    ["score", image.score.toFixed(4)],
    ["threshold", data.threshold.toFixed(4)],
    ["verdict", verdictOf(image)],
    ["p-value", image.p_value],
    ["label", image.label],
    ["kind", image.kind],
    ["remarks", image.remarks],
  ];
  const rows = told.filter(([, text]) => text !== "").flatMap(([name, text]) => [
    element("dt", "", name),
    element("dd", name === "remarks" || text === "flagged" ? "flagged" : "", text),
  ]);
  if (image.figure) {
    const link = element("a", "", image.figure), cell = element("dd");
    link.href = image.figure;
    cell.append(link);
    rows.push(element("dt", "", "figure"), cell);
  }
  by("facts").replaceChildren(...rows);
}

function show(place) {
  if (place < 0 || place >= shown.length) return;
  open = place;
  const image = data.images[shown[place]];
  stage.style.setProperty("--aspect", image.shape[1] / image.shape[0]);
  load(image);
  by("outline-choice").hidden = !image.outlined;
  by("title").textContent = `${image.index}  ${image.name}`;
  by("place").textContent = `${place + 1} of ${shown.length}`;
  by("previous").disabled = place === 0;
  by("next").disabled = place === shown.length - 1;
  facts(image);
  draw();
  if (!viewer.open) {
    viewer.showModal();
    stage.focus();
  }
}

async function load(image) {
  const turn = ++turns;
  stage.classList.add("loading"); // never one image's map over another's original
  const names = { original: "original.png", normal: "normal.png", map: "map.png" };
  if (image.outlined) names.outline = "outline.svg";
  else by("outline").removeAttribute("src");
  for (const [id, name] of Object.entries(names)) by(id).src = pictureOf(image, name);
  const loaded = await Promise.allSettled(Object.keys(names).map((id) => by(id).decode()));
  if (turn !== turns) return;
  stage.classList.remove("loading");
  by("missing").hidden = loaded.every((each) => each.status === "fulfilled");
}

function draw() {
  by("map").style.opacity = opacity.value / 100;
  by("normal").style.clipPath = `inset(0 0 0 ${swipe.value}%)`;
  const swept = swipe.value < 100;
  by("normal").hidden = by("divider").hidden = by("right").hidden = !swept;
  by("divider").style.left = `${swipe.value}%`;
  by("outline").hidden = !by("outlined").checked || !by("outline").hasAttribute("src");
  by("opacity-told").textContent = `${opacity.value} %`;
  by("swipe-told").textContent = `${swipe.value} %`;
}

function swipeTo(event) {
  const frame = stage.getBoundingClientRect();
  const share = (event.clientX - frame.left) / frame.width;
  swipe.value = Math.round(100 * Math.min(1, Math.max(0, share)));
  draw();
}

stage.addEventListener("pointerdown", (event) => {
  stage.setPointerCapture(event.pointerId);
  swipeTo(event);
});
stage.addEventListener("pointermove", (event) => {
  if (stage.hasPointerCapture(event.pointerId)) swipeTo(event);
});
for (const slider of [opacity, swipe]) {
  slider.addEventListener("input", draw);
  slider.addEventListener("pointerup", () => stage.focus()); // so that the arrows turn pages again after the mouse
}
by("outlined").addEventListener("change", draw);
by("previous").addEventListener("click", () => show(open - 1));
by("next").addEventListener("click", () => show(open + 1));
by("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => {
  const card = items[shown[open]].firstChild;
  card.focus();
  card.scrollIntoView({ block: "nearest" });
});
viewer.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey || event.target.type === "range") return;
  event.preventDefault();
  show(open + steps[event.key]);
});

for (const each of filters) each.addEventListener(each.tagName === "SELECT" ? "change" : "input", filter);
by("filters").addEventListener("submit", (event) => event.preventDefault());
fill(by("kind"), data.images.map((image) => image.kind));
fill(by("label"), data.images.map((image) => image.label));
filter();
