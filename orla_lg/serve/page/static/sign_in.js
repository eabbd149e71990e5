// Signing in and out. The key goes to the server once; what stays is a cookie that no script reads.

import { byId, hide, text } from "./dom.js";
import { messageOf } from "./stream.js";

async function post(path, body) {
  return fetch(path, {
    method: "POST",
    credentials: "same-origin",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** Prepare the form; `begun()` is called once a browser is signed in. */
export function prepareSignIn(begun) {
  const [form, key, fault] = [byId("sign-in-form"), byId("key"), byId("sign-in-fault")];
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    hide(fault, true);
    try {
      const response = await post("/page/sign-in", { key: key.value });
      if (response.ok) {
        key.value = "";
        begun();
        return;
      }
      text(fault, await messageOf(response));
    } catch {
      text(fault, "The server does not answer.");
    }
    hide(fault, false);
    key.select();
  });
}

/** Show the form, with why it is needed where that is news. */
export function showSignIn(why) {
  const fault = byId("sign-in-fault");
  text(fault, why);
  hide(fault, !why);
  byId("key").focus();
}

export async function signOut() {
  await post("/page/sign-out", {});
}
