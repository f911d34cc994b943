// Keys, and answers that are sent until they arrive. Without this script the forms work by themselves.
"use strict";

const PAUSE_MS = 250; // A second tap on the last pair must not answer the next one.
const RETRY_MS = 1500;

let ready = false;

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function showOffline(isOffline) {
  document.getElementById("offline").hidden = !isOffline;
}

// Nobody is to judge a picture that is not there.
async function show(picture) {
  for (;;) {
    try {
      return await picture.decode();
    } catch {
      showOffline(true);
      await pause(RETRY_MS);
      picture.src = picture.src;
    }
  }
}

async function settle() {
  ready = false;
  document.body.dataset.ready = "no";
  await Promise.all([...document.querySelectorAll("main img")].map(show));
  showOffline(false);
  await pause(PAUSE_MS);
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
    showOffline(true);
    await pause(RETRY_MS);
  }
}

async function submit(event) {
  event.preventDefault();
  if (!ready) return;
  ready = false;
  document.body.dataset.ready = "no";
  const text = await send(event.target, event.submitter);
  if (text === null) {
    location.reload();
    return;
  }
  const page = new DOMParser().parseFromString(text, "text/html");
  document.querySelector("main").replaceChildren(...page.querySelector("main").childNodes);
  document.title = page.title;
  window.scrollTo(0, 0);
  await settle();
}

function press(event) {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = CSS.escape(event.key.toLowerCase());
  const target = document.querySelector(`[data-key="${key}"]:not(:disabled)`);
  if (!target) return;
  event.preventDefault();
  target.click();
}

document.addEventListener("submit", submit);
document.addEventListener("keydown", press);
settle();
