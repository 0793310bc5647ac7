"use strict";
/* The streams of this tab.

   Over HTTP/1.1, a browser opens at most six connections to a server, for all of its tabs together. A further request,
   even a POST, would wait for ever. So the tabs share four slots, with Web Locks, and leave two connections for other
   requests. A tab that is hidden closes its streams; when it is shown again, it resumes them and gets what it missed. */

const SLOTS = ["asgi_sse 1", "asgi_sse 2", "asgi_sse 3", "asgi_sse 4"];
const HIDDEN_FOR_MS = 5000;
const streams = [];
let suspended = document.hidden;

/* Takes a slot. Resolves with a function that releases it; rejects when `signal` is aborted. */
async function takeSlot(signal, onWait) {
  if (!navigator.locks) return () => {};  // browsers have no locks over plain HTTP from another machine
  const request = (name, options) => new Promise((resolve, reject) => {
    const held = (lock) => lock ? new Promise((release) => resolve(release)) : resolve(null);
    navigator.locks.request(name, options, held).catch(reject);
  });
  for (const name of SLOTS) {
    const release = await request(name, { ifAvailable: true });
    if (release) return release;
  }
  signal.throwIfAborted();  // the stream may have been closed during the search
  onWait();
  // Wait for all slots; the first one that is free cancels the other requests.
  const others = new AbortController();
  signal.addEventListener("abort", () => others.abort());
  let taken = false;
  return Promise.any(SLOTS.map(async (name) => {
    const release = await request(name, { signal: others.signal });
    if (taken) { release(); throw new Error("another slot was free earlier"); }
    taken = true;
    others.abort();
    return release;
  }));
}

/* A stream that resumes after it was closed. States: connecting, waiting (for a slot), open, reconnecting, paused (the
   tab is hidden), refused (the server did not answer with a stream), or the state given to close(). */
class Stream {
  /* `handlers`: a function for each event type, called with the parsed data and the event.
     `onState`: called with each new state. */
  constructor(handlers, onState) {
    Object.assign(this, { handlers, onState, wanted: false, lastId: "", abort: null, source: null, release: null });
    streams.push(this);
  }

  open(url, lastId = this.lastId) {
    Object.assign(this, { url, lastId, wanted: true });
    this.update();
  }

  close(state = "closed") {
    this.wanted = false;
    this.update(state);
  }

  /* Connects or disconnects, so that the stream is open if it is wanted and the tab is visible. */
  update(state = "paused") {
    const open = this.wanted && !suspended;
    if (open === Boolean(this.abort)) return;
    if (open) this.connect(new AbortController());
    else this.disconnect(state);
  }

  async connect(abort) {
    this.abort = abort;
    this.onState("connecting");
    let release = () => {};
    try {
      release = await takeSlot(abort.signal, () => this.onState("waiting"));
    } catch {  // closed meanwhile, or locks are forbidden, such as in a frame of another origin
    }
    if (abort.signal.aborted) return release();
    this.release = release;
    const url = new URL(this.url, document.baseURI);
    // A new EventSource cannot send the header Last-Event-ID. When it reconnects by itself it does, and the header wins.
    if (this.lastId) url.searchParams.set("last_event_id", this.lastId);
    const source = this.source = new EventSource(url);
    source.onopen = () => this.onState("open");
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) this.close("refused");
      else this.onState("reconnecting");
    };
    for (const [type, handle] of Object.entries(this.handlers)) {
      source.addEventListener(type, (event) => {
        if (event.lastEventId) this.lastId = event.lastEventId;
        handle(JSON.parse(event.data), event);
      });
    }
  }

  disconnect(state) {
    this.abort.abort();
    this.source?.close();
    this.release?.();
    this.abort = this.source = this.release = null;
    this.onState(state);
  }
}

function suspend(hidden) {
  suspended = hidden;
  for (const stream of streams) stream.update();
}

let hideTimer = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hideTimer);
  if (document.hidden) hideTimer = setTimeout(suspend, HIDDEN_FOR_MS, true);
  else suspend(false);
});
addEventListener("pagehide", () => suspend(true));
addEventListener("pageshow", () => suspend(document.hidden));
