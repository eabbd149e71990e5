// What changes the server: requests of the control protocol, asked for again where they take something away.

import { byId, h, text } from "./dom.js";
import { messageOf } from "./stream.js";

const DRAIN_S = 120;
const TOAST_MS = 6_000;

async function control(request) {
  const response = await fetch("/v1/orla/control", {
    method: "POST",
    credentials: "same-origin",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(request),
  });
  if (!response.ok) throw new Error((await messageOf(response)) || `the server answers ${response.status}`);
  return response.json();
}

/** Carry out a request, and say what came of it; returns whether it went well. */
async function steer(request, well) {
  try {
    const reply = await control(request);
    toast(typeof well === "function" ? well(reply) : well);
    return true;
  } catch (error) {
    toast(error instanceof TypeError ? "The server does not answer; nothing was changed." : error.message, true);
    return false;
  }
}

export function setPaused(backend, paused) {
  return steer(
    { do: paused ? "pause" : "resume", backend },
    paused ? `${backend} is paused: its calls wait.` : `${backend} takes calls again.`,
  );
}

export async function askAndDrain(backend) {
  const said = `Calls that are at ${backend} now go on to their end, and all others wait. It stays paused afterwards, until you resume it.`;
  if (!(await confirmed(`Drain ${backend}?`, said, "Drain"))) return;
  toast(`${backend} is draining.`);
  await steer({ do: "drain", backend, timeout_s: DRAIN_S }, (reply) =>
    reply.drained
      ? `${backend} is drained.`
      : `${backend} is not drained: it was resumed, or calls are still there after ${DRAIN_S} s.`,
  );
}

export async function prioritize(workflow, priority) {
  if (!workflow.runs.length) {
    toast(`${workflow.name} has no open run, whose calls could be given a priority.`, true);
    return;
  }
  for (const run of workflow.runs) {
    if (!(await steer({ do: "prioritize", run, priority }, `${workflow.name} has priority ${priority}.`))) return;
  }
}

/** Ask in a dialog, and return whether the answer is yes. */
export function confirmed(title, said, yes) {
  const dialog = byId("ask");
  text(byId("ask-title"), title);
  text(byId("ask-text"), said);
  text(byId("ask-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export function toast(said, isFault = false) {
  const shown = h("p", { class: isFault ? "toast bad" : "toast" }, said);
  byId("toasts").append(shown);
  setTimeout(() => shown.remove(), TOAST_MS);
}
