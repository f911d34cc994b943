// The slider over iterations, pictures that open large, and buttons that copy commands. Without this
// script the page shows the first pictures beside the last.
"use strict";

const find = (selector, within = document) => [...within.querySelectorAll(selector)];
const slider = document.getElementById("time");
const viewer = document.getElementById("viewer");
let shown = null; // The button whose picture is open.

// ------------------------------------------------------------------ the slider over iterations

function show(iteration) {
  for (const now of find(".now")) {
    const shots = find(".shot", now);
    const past = shots.filter((shot) => Number(shot.dataset.iteration) <= iteration);
    const chosen = past.at(-1) ?? shots[0];
    for (const shot of shots) shot.hidden = shot !== chosen;
  }
}

if (slider) {
  const times = find("#times option").map((option) => [Number(option.value), option.label]);
  slider.closest("label").hidden = false;
  slider.addEventListener("input", () => {
    const [iteration, text] = times[slider.value];
    document.getElementById("time-text").value = text;
    slider.setAttribute("aria-valuetext", text);
    show(iteration);
  });
  slider.dispatchEvent(new Event("input"));
}

// ------------------------------------------------------------------ pictures that open large

function open(shot) {
  const picture = shot.querySelector("img");
  const large = document.getElementById("viewer-picture");
  large.src = picture.src;
  large.alt = picture.alt;
  large.className = picture.className;
  document.getElementById("viewer-text").value = picture.alt;
  shown = shot;
  if (!viewer.open) viewer.showModal();
}

function step(within, by) {
  const shots = find(".shot", within);
  const place = shots.indexOf(shown) + by;
  if (shots[place]) open(shots[place]);
}

function stepRow(by) {
  const rows = find(".row");
  const row = shown.closest(".row");
  const next = rows[rows.indexOf(row) + by];
  if (!next) return;
  const place = find(".shot", row).indexOf(shown);
  const shots = find(".shot", next);
  open(shots[Math.min(place, shots.length - 1)]);
}

document.addEventListener("click", (event) => {
  const shot = event.target.closest(".shot");
  if (shot) open(shot);
  const button = event.target.closest("[data-step]");
  if (button) step(shown.closest(".row"), Number(button.dataset.step));
  if (event.target === viewer || event.target.closest("#viewer-close")) viewer.close();
});

viewer.addEventListener("keydown", (event) => {
  const moves = {
    ArrowLeft: () => step(shown.closest(".row"), -1),
    ArrowRight: () => step(shown.closest(".row"), 1),
    ArrowUp: () => stepRow(-1),
    ArrowDown: () => stepRow(1),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});

viewer.addEventListener("close", () => {
  const visible = shown.hidden ? shown.closest(".row").querySelector(".shot:not([hidden])") : shown;
  visible.focus();
});

// ------------------------------------------------------------------ commands

for (const button of find(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // Pages that were opened as files may not copy.
      button.textContent = "Selected";
    }
  });
}
