// The server's stream of events: read as it comes, opened again when it breaks off.
// It is no EventSource, since that does not say why a server refused.

const SILENT_MS = 5_000; // the server sends something each second
const FIRST_PAUSE_MS = 400;
const LONGEST_PAUSE_MS = 5_000;

/** Yield the events of a response's body as [name, data]. */
async function* eventsIn(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const block = rest.slice(0, end);
      rest = rest.slice(end + 2);
      const name = /^event: (.*)$/m.exec(block)?.[1];
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (name && data !== undefined) yield [name, JSON.parse(data)];
    }
  }
}

export class Stream {
  /**
   * @param {(name: string, data: any) => void} take takes each event
   * @param {(state: string, why?: string) => void} tell hears of "open", "lost" and "refused"
   */
  constructor(take, tell) {
    this.take = take;
    this.tell = tell;
    this.workflow = null;
    this.current = null;
    this.pauseMs = FIRST_PAUSE_MS;
  }

  /** Begin, or begin again, with the calls of a workflow one by one. */
  open(workflow = this.workflow) {
    this.workflow = workflow;
    this.close();
    const mine = (this.current = new AbortController());
    this.run(mine);
  }

  close() {
    this.current?.abort();
    clearTimeout(this.timer);
    clearTimeout(this.silence);
  }

  async run(mine) {
    let why = "the server ended the stream";
    try {
      const query = this.workflow === null ? "" : `?workflow=${this.workflow}`;
      this.listen(mine);
      const response = await fetch(`/v1/orla/events${query}`, {
        signal: mine.signal,
        credentials: "same-origin",
        cache: "no-store",
      });
      if ([401, 403, 421].includes(response.status)) {
        clearTimeout(this.silence);
        this.tell("refused", { status: response.status, message: await messageOf(response) });
        return;
      }
      if (!response.ok) {
        why = (await messageOf(response)) || `the server answers ${response.status}`;
      } else {
        this.pauseMs = FIRST_PAUSE_MS;
        this.tell("open");
        for await (const [name, data] of eventsIn(response.body)) {
          if (mine.signal.aborted) return;
          this.listen(mine);
          if (name === "bye") why = data.why;
          else this.take(name, data);
        }
      }
    } catch (error) {
      if (mine.signal.aborted && mine.signal.reason !== "silent") return;
      why = mine.signal.reason === "silent" ? "the server is silent" : "the server does not answer";
    }
    if (this.current !== mine) return;
    clearTimeout(this.silence);
    this.tell("lost", { why });
    this.timer = setTimeout(() => this.open(), this.pauseMs * (0.8 + 0.4 * Math.random()));
    this.pauseMs = Math.min(LONGEST_PAUSE_MS, this.pauseMs * 1.7);
  }

  /** Give up on a server that says nothing from now on. */
  listen(mine) {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => mine.abort("silent"), SILENT_MS);
  }
}

/** Return what a refusal says. */
export async function messageOf(response) {
  const said = await response.text();
  try {
    const { error, message } = JSON.parse(said);
    return message ?? error?.message ?? (typeof error === "string" ? error : "");
  } catch {
    return said.slice(0, 300);
  }
}
