// Keys, and answers that are sent until they arrive. Without this script the forms work by themselves.
"use strict";

const PAUSE_MS = 250; // A second tap on the last pair must not answer the next one.
const RETRY_MS = 1500;

let ready = false;

async function settle() {
  ready = false;
  const pictures = [...document.querySelectorAll("main img")];
  await Promise.allSettled(pictures.map((picture) => picture.decode()));
  await new Promise((done) => setTimeout(done, PAUSE_MS));
  ready = true;
  document.body.dataset.ready = "yes";
}

async function send(form, button) {
  const fields = new URLSearchParams(new FormData(form));
  if (button && button.name) fields.set(button.name, button.value);
  for (;;) {
    try {
      const answer = await fetch(form.action, { method: "POST", body: fields });
      if (answer.ok) return await answer.text();
      if (answer.status < 500) return null; // Repeating it would not help.
    } catch {
      // The server is away; it comes back where it stopped.
    }
    document.getElementById("offline").hidden = false;
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

async function submit(event) {
  event.preventDefault();
  if (!ready) return;
  ready = false;
  document.body.dataset.ready = "no";
  const text = await send(event.target, event.submitter);
  document.getElementById("offline").hidden = true;
  if (text === null) {
    location.reload();
    return;
  }
  const large = document.getElementById("large")?.checked;
  const page = new DOMParser().parseFromString(text, "text/html");
  document.querySelector("main").replaceWith(page.querySelector("main"));
  document.title = page.title;
  const box = document.getElementById("large");
  if (box && large) box.checked = true;
  window.scrollTo(0, 0);
  await settle();
}

function press(event) {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  const box = document.getElementById("large");
  const target =
    key === "l" ? box : document.querySelector(`[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (!target) return;
  event.preventDefault();
  target.click();
}

document.addEventListener("submit", submit);
document.addEventListener("keydown", press);
settle();
